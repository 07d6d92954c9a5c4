"""Proves for a graph that each row of the outputs is computed from its own row and the weights.

The batch axis is followed through every node: views regroup it, broadcasts join it, and an op that
combines elements along it, moves rows, or chooses them by number is named with the user's line.
What is proven is which inputs a row reads, for all batch sizes at once; that the sums it reads them
with have one order is the promise of the kernels (`docs/ops.md`).  The two together are batch
invariance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from bicompile.independence.axes import (
    MIXES,
    PROVEN,
    UNDECIDED,
    Factor,
    Poison,
    Tag,
    Value,
    plain,
)
from bicompile.independence.trace import BatchAxes, trace
from bicompile.independence.walk import Walk, expression, shape_of

__all__ = ["MIXES", "PROVEN", "UNDECIDED", "Independence", "prove", "prove_model"]

Batch = str | Mapping[str, int] | None


@dataclass(frozen=True)
class Independence:
    """What is known of one output of a graph.

    Args:
        output: its name: that of the node, or of the input that is written.
        verdict: "proven", "mixes" or "undecided".
        node: the node at which rows mix, or beyond which nothing is known; None if proven.
        line: the user's source line of that node, if known.
        reason: why, in a few words.
        axis: the axis of the output that holds the rows, if one does and it is proven.
    """

    output: str
    verdict: str
    node: str | None
    line: str | None
    reason: str
    axis: int | None = None


def prove(gm: GraphModule, batch: Batch = None) -> list[Independence]:
    """Say for each output whether its row i depends on row i of the inputs and on weights alone.

    Args:
        gm: a functional graph of aten ops or ours with fake values in ``meta["val"]``, as AOT
            autograd, `torch.export` and our passes give it.
        batch: the symbol of the batch size, or the axis of the batch by names of placeholders; by
            default axis 0 of the inputs that have there the most common open size, or another that
            was as large when the graph was traced.

    Returns:
        one `Independence` for each tensor that is returned or written to an input.  "proven" also
        means that no number in the output depends on the batch size or on a row's place; "mixes"
        that rows meet at a node, whose result the output needs; "undecided" that the rules cannot
        follow the rows through a node.  An op without a rule is undecided, never proven.

    Example:
        >>> prove(gm)[0].verdict  # doctest: +SKIP
        'proven'
    """
    (output,) = gm.graph.find_nodes(op="output")
    return _prove(gm, batch, [getattr(node, "name", "") for node in _results(output)])


def _prove(gm: GraphModule, batch: Batch, names: Sequence[str]) -> list[Independence]:
    (output,) = gm.graph.find_nodes(op="output")
    names = [n if _is_tensor(r) else "" for n, r in zip(names, _results(output), strict=True)]
    walk = follow(gm, batch)
    if isinstance(walk, str):
        return [Independence(n, UNDECIDED, None, None, walk) for n in names if n]
    found = [_judge(n, v, walk.batch) for n, v in zip(names, walk.results, strict=True) if n]
    return found + [_judge(n, v, walk.batch) for n, v in walk.written.items()]


def prove_model(
    model: torch.nn.Module,
    *args: Any,
    batch: BatchAxes = None,
    **kwargs: Any,
) -> list[Independence]:
    """Trace a model with a batch of any size and `prove` it; our backend is not needed.

    Args:
        model: a module; its mode (eval or train) is kept.
        args: inputs.
        batch: the axis of the batch by the positions or names of inputs, None for those without;
            by default axis 0 of every tensor that has as many elements there as the first.
        kwargs: more inputs.

    Returns:
        as `prove`; one "undecided" without a node if the model cannot be traced with a batch of any
        size.

    Example:
        >>> [found] = prove_model(torch.nn.Linear(3, 4), torch.randn(2, 3))
        >>> found.verdict
        'proven'
    """
    try:
        traced = trace(model, args, kwargs, batch)
    except Exception as error:  # whatever a model may raise while it is traced
        first = str(error).strip().partition("\n")[0] or repr(error)
        reason = f"the model cannot be traced with a batch of any size: {first}"
        return [Independence("the model", UNDECIDED, None, None, reason)]
    return _prove(traced.gm, traced.batch, traced.names)


def follow(gm: GraphModule, batch: Batch = None) -> Walk | str:
    """What is known of every node, and what is written to inputs; or why nothing is.

    The results of the graph are `Walk.results`.
    """
    holes = gm.graph.find_nodes(op="placeholder")
    symbols = _batch_symbols(holes, batch)
    if isinstance(symbols, str):
        return symbols
    walk = Walk(gm, symbols)
    walk.run([_input(node, symbols) for node in holes])
    return walk


def _batch_symbols(holes: Sequence[Node], batch: Batch) -> frozenset[sympy.Symbol] | str:
    """The symbols of the batch size, one or several that are not known to be equal, or why none."""
    tensors = {n.name: v for n in holes if isinstance(v := n.meta.get("val"), torch.Tensor)}
    if isinstance(batch, str):
        sizes = [s for v in tensors.values() for s in v.shape if str(expression(s)) == batch]
    elif batch is not None:
        sizes = [tensors[name].shape[axis] for name, axis in batch.items()]
    else:
        leading = [v.shape[0] for v in tensors.values() if v.dim()]
        open_ = [s for s in leading if isinstance(expression(s), sympy.Symbol)]
        common = [e for e, _ in Counter(map(expression, open_)).most_common(1)]
        hints = {_hint(s) for s in open_ if expression(s) in common}
        sizes = [s for s in open_ if expression(s) in common or _hint(s) in hints]
    symbols = frozenset(map(expression, sizes))
    if symbols and all(isinstance(s, sympy.Symbol) for s in symbols):
        return symbols
    return "no input has a batch axis whose size is open: trace with a batch of any size"


def _hint(size: Any) -> int | None:
    """The size that the graph was traced with."""
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)


def _input(node: Node, symbols: frozenset[sympy.Symbol]) -> Any:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return expression(val)
    shape = shape_of(val)
    open_ = [s for s in shape if not symbols.isdisjoint(s.free_symbols)]
    if len(open_) > 1 or any(s not in symbols for s in open_):
        reason = f"{node.name}: which of its axes is the batch is not known"
        return Poison(UNDECIDED, reason, node.name)
    return Value(tuple((Factor(s, Tag.ROW),) if s in symbols else plain(s) for s in shape))


def _results(output: Node) -> Sequence[Any]:
    (results,) = output.args
    return results if isinstance(results, (list, tuple)) else [results]


def _is_tensor(result: Any) -> bool:
    return isinstance(result, Node) and isinstance(result.meta.get("val"), torch.Tensor)


def _judge(name: str, value: Any, symbols: frozenset[sympy.Symbol]) -> Independence:
    if isinstance(value, Poison):
        return Independence(name, value.verdict, value.node, value.line, value.reason)
    if not isinstance(value, Value):
        return Independence(name, UNDECIDED, name, None, "it is not known to be a tensor")
    for poison in (value.content and value.content.poison, *_orders(value)):
        if poison is not None:
            return _judge(name, poison, symbols)
    if value.fixed:
        (axis,) = (d for d, a in enumerate(value.axes) if any(f.fixed for f in a))
        return Independence(name, PROVEN, None, None, f"axis {axis} holds the rows", axis)
    factors = [f for a in value.axes for f in a if not symbols.isdisjoint(f.size.free_symbols)]
    if any(f.tag is not Tag.SAME for f in factors):
        reason = "what stands at a place depends on the batch size"
        return Independence(name, UNDECIDED, name, None, reason)
    return Independence(name, PROVEN, None, None, "it reads no row")


def _orders(value: Value) -> Iterator[Poison | None]:
    return (f.order.poison for f in value.fixed if f.order is not None)
