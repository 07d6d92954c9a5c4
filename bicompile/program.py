"""A graph as the sequence of its steps that round: what decides bits, without what moves them.

Views, copies, gathers, sizes and everything on integers and booleans are exact whatever their order
is; they are looked through.  Two programs with equal steps compute a row by the same operations, in
the same order of summation, with the same roundings.  Sizes are no part of a step: static and
dynamic shapes, a long prompt and one token with a cache, have the same steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from bicompile import graph, provenance
from bicompile.passes.audit import ALLOWED, reason_to_stay
from bicompile.registry import OPS

_MOVING = ("view or copy", "gather", "write", "size")
_CREATES = ALLOWED["creation"][1]

Read = tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One operation that rounds.

    Args:
        op: what is called.
        order: the pinned order of summation; empty where an element is computed from one of each.
        arguments: the numbers among the arguments: scales, epsilons, reduced axes.
        dtypes: of the inputs, an arrow, and of the outputs: each output is rounded once.
        reads: for each operand, the parameters and the steps (counted backwards) it comes from.
        where: node and source line, for people; no part of the comparison.
    """

    op: str
    order: str
    arguments: str
    dtypes: str
    reads: tuple[Read, ...]
    where: str = ""

    def aspects(self) -> dict[str, Any]:
        """What is compared, by the name that a difference is given."""
        return {
            "op": self.op,
            "order": self.order,
            "arguments": self.arguments,
            "rounding": self.dtypes,
            "reads": self.reads,
        }


def steps(gm: GraphModule, inputs: Sequence[str] = ()) -> list[Step]:
    """The steps of a graph; calls of nested graphs are opened.

    Args:
        gm: the graph.
        inputs: what the user calls its inputs; parameters keep these names.
    """
    reader = _Reader()
    reader.walk(gm, [frozenset([name]) for name in inputs])
    return reader.found


Sources = frozenset[Any]
"""Where a value comes from: numbers of steps, and names of inputs."""


class _Reader:
    """Walks a graph and collects its steps, with where each operand comes from."""

    def __init__(self) -> None:
        self.found: list[Step] = []

    def walk(self, gm: GraphModule, inputs: Sequence[Sources]) -> list[Sources]:
        """Collect the steps of a graph on inputs of known origin; returns that of its outputs."""
        origin: dict[Node, Any] = {}
        children = dict(gm.named_children())
        nested: dict[Node, GraphModule] = {}
        arriving = iter(inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                origin[node] = next(arriving, frozenset())
            elif node.op == "get_attr":
                if isinstance(held := children.get(str(node.target)), GraphModule):
                    nested[node] = held
                origin[node] = frozenset([f"constant {node.target}"])
            elif node.op == "call_function":
                origin[node] = self._call(node, origin, nested)
            elif node.op == "output":
                return [origin.get(a, frozenset()) for a in tree_leaves(node.args)]
        return []

    def _call(self, node: Node, origin: dict[Node, Any], nested: Mapping[Node, GraphModule]) -> Any:
        args: Sequence[Any] = node.args
        if args and isinstance(args[0], Node) and args[0] in nested:
            return self.walk(nested[args[0]], [origin[a] for a in args[2:]])
        name = _name(node)
        if name == "getitem" and isinstance(origin[args[0]], list):
            return origin[args[0]][args[1]]
        sources = [_merge(origin[n] for n in _nodes(a)) for a in _operands(node)]
        if not _rounds(node, name):
            return _merge(sources)
        number = len(self.found)
        self.found.append(_step(node, number, sources))
        return frozenset([number])


def _nodes(x: Any) -> list[Node]:
    return [n for n in tree_leaves(x) if isinstance(n, Node)]


def _arguments(node: Node) -> list[Any]:
    """The arguments in order, without those that say which keys are seen: masked is absent."""
    kernel = OPS.get(_name(node))
    if kernel is None or getattr(node.target, "namespace", "") != "bicompile":
        return [*node.args, *node.kwargs.items()]
    hidden = {
        "is_causal",
        "visible",
        *(name for case in kernel.contract.cases for name in case.masks),
    }
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return [a for name, a in zip(names, node.args, strict=False) if name not in hidden]


def _operands(node: Node) -> list[Any]:
    """The arguments that hold nodes, in order."""
    return [a for a in _arguments(node) if _nodes(a)]


def _merge(sources: Iterable[Any]) -> Sources:
    """All origins together."""
    merged: set[Any] = set()
    for source in sources:
        merged.update(*source) if isinstance(source, list) else merged.update(source)
    return frozenset(merged)


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _rounds(node: Node, name: str) -> bool:
    """Whether a node computes floating-point numbers, rather than moving them."""
    held = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    reason = reason_to_stay(node) or ""
    moves = name == "getitem" or reason.startswith(_MOVING)
    return not moves and any(_is_float(v) for v in held)


def _is_float(x: torch.Tensor) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


def _step(node: Node, number: int, sources: Sequence[Sources]) -> Step:
    target, name = graph.target_name(node), _name(node)
    ours = target.startswith("bicompile.")
    reads = tuple(tuple(sorted(_reads(operand, number))) for operand in sources)
    return Step(
        op=target,
        order=OPS[name].order if ours else "",
        arguments=_numbers(node, creates=name in _CREATES),
        dtypes=f"{_dtypes(_operands(node))} -> {_dtypes([node])}",
        reads=reads,
        where=f"{node.name}, {graph.user_line(node) or provenance.module_path(node)}",
    )


def _reads(sources: Sources, number: int) -> Iterator[str]:
    """Parameters by name, steps by distance; what is fed in differs from call to call."""
    for source in sources:
        if not isinstance(source, str):
            yield f"-{number - source}"
        elif source and not source.startswith("input "):
            yield source


def _numbers(node: Node, *, creates: bool) -> str:
    """The literal arguments; the sizes of what is created are left out."""
    literals = [
        _literal(a)
        for a in _arguments(node)
        if not _nodes(a)
        and not (creates and isinstance(a, (list, tuple)) and a and a[0] != "dtype")
    ]
    return ", ".join(literals)


def _literal(x: Any) -> str:
    if isinstance(x, (torch.SymInt, torch.SymFloat)):
        return str(graph.hint(x))
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_literal, x))}]"
    return str(x)


def _dtypes(values: Sequence[Any]) -> str:
    leaves = [v for a in values for n in _nodes(a) for v in tree_leaves(n.meta.get("val"))]
    return " ".join(
        str(v.dtype).removeprefix("torch.") for v in leaves if isinstance(v, torch.Tensor)
    )
