"""A loss widens its logits; what log_softmax needs of a row is read from them as they are.

Before::

    %f = prims.convert_element_type(%logits, float32)
    %v = aten.view.default(%f, [-1, 50000])
    %s = bicompile.softmax_statistics.default(%v, 1)
    %d = aten.sub.Tensor(%v, %max)

becomes::

    %f = prims.convert_element_type(%logits, float32)
    %v = aten.view.default(%f, [-1, 50000])
    %h = aten.view.default(%logits, [-1, 50000])
    %s = bicompile.softmax_statistics.default(%h, 1)
    %d = aten.sub.Tensor(%v, %max)

because the op reads halves as float32, and all others that read %v are pointwise.  It runs over
forward and backward together: what only pointwise nodes read is computed again for the gradient,
and no tensor of wide logits is ever in memory.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from bicompile.graph import Emit, narrow
from bicompile.registry import load_all

aten = torch.ops.aten
_STATISTICS = load_all()["softmax_statistics"].op
_MOVES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
)


def read_halves(graph: Graph) -> None:
    """Hand logits to the op as they were before they were widened; no bit changes."""
    for node in graph.find_nodes(op="call_function", target=_STATISTICS):
        source, moves = node.args[0], []
        while source.target in _MOVES:
            moves.append(source)
            source = source.args[0]
        half = narrow(source)
        if half is source:
            continue
        emit = Emit(node)
        for move in reversed(moves):
            half = emit(move.target, half, *move.args[1:])
        node.args = (half, *node.args[1:])
