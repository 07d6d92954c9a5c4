"""The gradient of a loss over classes is, in each row, zero but for one class; no bit changes.

Before::

    %q = aten.eq.Tensor(%classes, %target)             # iota [1, C], [N, 1]
    %g = aten.where.self(%q, %value, 0.0)              # [N, C]
    %t = bicompile.sum.default(%g, [1], True, float32)

becomes::

    %t = aten.where.self(%outside, 0.0, %value)        # [N, 1]: %target names no class

because a sum of one number and zeros is that number in every order (and 0 for -0): with a
vocabulary of 150000, %g would be most of the memory of a training step.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, narrow, value
from bicompile.passes.rules.common import as_dtype, fill, size
from bicompile.registry import load_all

aten = torch.ops.aten
prims = torch.ops.prims
_SUM = load_all()["sum"].op
_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default)
_NUMBERS = {aten.full.default: 1, aten.scalar_tensor.default: 0}


def fuse_one_hot(gm: GraphModule, *, run) -> None:
    """Replace the sum of a row that has one number by that number."""
    for node in gm.graph.find_nodes(op="call_function", target=_SUM):
        x, dims, keepdim, dtype = node.args
        found = _one_hot(narrow(x), dims[0]) if len(dims) == 1 else None
        if found is None or not run.fuel():
            continue
        place, number = found
        emit, d = Emit(node), dims[0]
        outside = emit(aten.ge.Scalar, place, size(emit, x, d, value(x).shape[d]))
        for nothing in (emit(aten.lt.Scalar, place, 0), emit(aten.eq.Scalar, number, 0)):
            outside = emit(aten.logical_or.default, outside, nothing)
        new = as_dtype(emit, fill(emit, number, outside, 0.0), dtype)
        if not keepdim:
            new = emit(aten.squeeze.dim, new, d)
        run.decide(node, "a row with one number that is not zero", became=str(aten.where.self))
        emit.take_place(new)


def _one_hot(x: Node, d: int) -> tuple[Node, Node] | None:
    """The place and the number of the one element of each row along d that may not be zero."""
    if x.target is not aten.where.self or not _is_zero(x.args[2]):
        return None
    same, number, _ = x.args
    if same.target is not aten.eq.Tensor:
        return None
    for classes, place in (same.args, same.args[::-1]):
        if _counts(classes, value(x), d) and all(_stands_still(t, x, d) for t in (place, number)):
            return place, number
    return None


def _is_zero(x: object) -> bool:
    return isinstance(x, Node) and x.target in _NUMBERS and x.args[_NUMBERS[x.target]] == 0


def _counts(x: object, like: torch.Tensor, d: int) -> bool:
    """Whether x is 0, 1, 2 ... along axis d of `like`, and has no other axis."""
    if not isinstance(x, Node):
        return False
    shape, rank = value(x).shape, like.dim()
    at = d - (rank - len(shape))
    others = [n for i, n in enumerate(shape) if i != at]
    if at < 0 or not all(statically_known_true(n == 1) for n in others):
        return False
    while x.target in _VIEWS:
        x = x.args[0]
    from_zero = x.target is prims.iota.default and (x.kwargs["start"], x.kwargs["step"]) == (0, 1)
    return from_zero and statically_known_true(shape[at] == like.shape[d])


def _stands_still(x: object, like: Node, d: int) -> bool:
    """Whether x has one element along axis d, and all the other axes."""
    if not isinstance(x, Node):
        return False
    ours, shape = value(x).shape, value(like).shape
    return len(ours) == len(shape) and all(
        statically_known_true(n == (1 if i == d else m))
        for i, (n, m) in enumerate(zip(ours, shape, strict=True))
    )
