"""Log-probabilities of chosen tokens without those of all others; no bit changes.

Before, with an optional slice of the rows in between::

    %f = prims.convert_element_type(%logits, float32)
    %p = bicompile.log_softmax.default(%f, 2, float32)
    %s = aten.slice.Tensor(%p, 1, 0, -1)
    %o = aten.gather.default(%s, -1, %tokens)

becomes::

    %t = aten.slice.Tensor(%logits, 1, 0, -1)
    %o = bicompile.log_softmax_gather.default(%t, 2, %tokens, float32)

because with a vocabulary of 150000 the logits in float32 and their logarithms are most of the
memory that scoring takes, and all but one element of each row are thrown away.  gather lets the
index have fewer rows; where that cannot be excluded, the others are sliced away, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.contract import HALF_AND_FLOAT
from bicompile.graph import Emit, carry_origins, value
from bicompile.passes.rules.common import size
from bicompile.registry import load_all

aten = torch.ops.aten
KERNELS = load_all()
_CONVERT = torch.ops.prims.convert_element_type.default


def fuse_log_softmax(gm: GraphModule, *, run) -> None:
    """Join log_softmax with the gather that is its only use."""
    op = KERNELS["log_softmax_gather"].op
    for gather in gm.graph.find_nodes(op="call_function", target=aten.gather.default):
        source, dim, index = gather.args[:3]
        slices = list(_slices(source))
        log_softmax = slices[-1].args[0] if slices else source
        if not _is_alone(log_softmax) or not _is_along(log_softmax, dim, slices, source):
            continue
        if not run.fuel():
            continue
        logits, axis, dtype = log_softmax.args
        logits = _narrow(logits)
        emit = Emit(gather)
        for part in reversed(slices):
            logits = emit(part.target, logits, *part.args[1:])
        logits = _rows_of(emit, logits, axis, index)
        run.decide(gather, "the chosen elements of log_softmax alone", became=str(op))
        new = emit(op, logits, axis, index, dtype)
        carry_origins(new, log_softmax)
        emit.take_place(new)


def _slices(node: Node) -> Iterator[Node]:
    """The slices, each used once, that lead to a node, the last one first."""
    while node.target is aten.slice.Tensor and len(node.users) == 1:
        yield node
        node = node.args[0]


def _narrow(logits: Node) -> Node:
    """What float32 logits were widened from: the op reads halves as float32."""
    half = logits.target is _CONVERT and value(logits.args[0]).dtype in HALF_AND_FLOAT
    return logits.args[0] if half and logits.args[1] is torch.float32 else logits


def _is_alone(node: Node) -> bool:
    return node.target is KERNELS["log_softmax"].op and len(node.users) == 1


def _is_along(log_softmax: Node, dim: int, slices: list[Node], source: Node) -> bool:
    """Whether the gather is along the axis of log_softmax, and no slice is."""
    axis, rank = log_softmax.args[1], value(source).dim()
    along = [n.args[1] % rank if len(n.args) > 1 else 0 for n in slices]
    return rank > 0 and dim % rank == axis and axis not in along


def _rows_of(emit: Emit, logits: Node, axis: int, index: Node) -> Node:
    """The rows of the logits that the index has."""
    for d, (have, want) in enumerate(zip(value(logits).shape, value(index).shape, strict=True)):
        if d != axis and not statically_known_true(have == want):
            logits = emit(aten.slice.Tensor, logits, d, 0, size(emit, index, d, want))
    return logits
