"""Traces a model with a batch of any size: a functional graph of aten ops, no backend needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

BatchAxes = Mapping[str | int, int | None] | None


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Args:
        program: its graph; parameters and buffers come before the leaves of the inputs.
        batch: the axis of the batch by names of placeholders.
        names: of the results: buffers by their own, others by number.
    """

    program: torch.export.ExportedProgram
    batch: Mapping[str, int]
    names: Sequence[str]

    @property
    def gm(self) -> torch.fx.GraphModule:
        """The graph."""
        gm: torch.fx.GraphModule = self.program.graph_module
        return gm

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What the graph is called with: weights, then the leaves of the inputs."""
        leaves = iter(tree_leaves((args, kwargs)))
        kept = {**self.program.constants, **self.program.state_dict}
        return [
            next(leaves) if spec.target is None else kept[spec.target]
            for spec in self.program.graph_signature.input_specs
        ]


def trace(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch: BatchAxes = None
) -> Traced:
    """Trace a model as it is (eval or train); `batch` as in `bicompile.independence.prove_model`.

    Raises:
        Exception: whatever the model raises with a batch of any size.
    """
    inputs = (tuple(args), dict(kwargs))
    axes = _axes(inputs, batch)
    # One size for all inputs, or, where the traced code compares it with a number, one for each.
    try:
        program = _export(model, inputs, axes, torch.export.Dim("batch"))
    except Exception as error:
        try:
            program = _export(model, inputs, axes, torch.export.Dim.DYNAMIC)
        except Exception:
            raise error from None
    holes = program.graph_signature.user_inputs
    given = {str(n): a for n, a in zip(holes, axes, strict=True) if a is not None}
    return Traced(program, given, _names(program))


class _Whole(torch.nn.Module):
    """A model behind two arguments, so that axes are named alike for all signatures."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        return self.model(*args, **kwargs)


def _axes(inputs: Any, batch: BatchAxes) -> list[int | None]:
    """The axis of the batch in each leaf of the inputs."""
    args, kwargs = inputs
    if batch is not None:
        named = [*enumerate(args), *kwargs.items()]
        return [batch.get(name) for name, x in named for _ in tree_leaves(x)]
    leaves = tree_leaves(inputs)
    sizes = [x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else None for x in leaves]
    rows = next((s for s in sizes if s is not None), None)
    return [None if s is None or s != rows else 0 for s in sizes]


def _export(model: torch.nn.Module, inputs: Any, axes: Sequence[int | None], dim: Any) -> Any:
    """A functional graph of the model, the ops with a rule left whole."""
    from bicompile.independence.rules import TABLE

    left, again = iter(axes), iter(axes)

    def described(_: Any) -> Any:
        axis = next(left)
        return None if axis is None else {axis: dim}

    def several(x: Any) -> Any:
        """A batch of 1 would be taken for the number 1."""
        axis = next(again)
        return x if axis is None or x.shape[axis] > 1 else torch.cat([x, x], axis)

    table = torch.export.default_decompositions()
    for op in list(table):
        if isinstance(op, torch._ops.OpOverload) and op._schema.name in TABLE:
            table.pop(op)
    with torch.no_grad():
        program = torch.export.export(
            _Whole(model),
            tree_map(several, inputs),
            dynamic_shapes=tree_map(described, inputs),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return program.run_decompositions(table)


def _names(program: torch.export.ExportedProgram) -> list[str]:
    targets = [spec.target for spec in program.graph_signature.output_specs]
    numbers = itertools.count()
    return [
        f"output {next(numbers)}" if target is None else target.removeprefix("model.")
        for target in targets
    ]
