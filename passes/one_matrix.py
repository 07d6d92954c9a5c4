"""Products of a batch with one matrix.

What `linear` makes of rows that are apart in memory, such as the last token of each sequence, where
the weight needs no gradient::

    %w = aten.expand.default(%t, [B, K, N])
    %v = aten.view.default(%w, [B, K, N])
    %y = aten.bmm.default(%x, %v)

becomes::

    %r = aten.reshape.default(%x, [B * M, K])
    %p = aten.mm.default(%r, %t)
    %y = aten.reshape.default(%p, [B, M, N])

because then all rows read the matrix once: the head of a language model, read for each sequence of
a batch of 8, took 2.15 ms of an H200 instead of 0.28.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, value
from bicompile.passes.rules.common import product, size

aten = torch.ops.aten
_VIEWS = (aten.expand.default, aten.view.default, aten._unsafe_view.default)


def multiply_one_matrix(gm: GraphModule, *, run) -> None:
    """Give the rows of all of a batch to one product."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
        x, other = node.args
        matrix = _before_expansion(other)
        if matrix is None or not run.fuel():
            continue
        emit = Emit(node)
        batch, m, k = (size(emit, x, i, known) for i, known in enumerate(value(x).shape))
        n = size(emit, other, 2, value(other).shape[2])
        rows = emit(aten.reshape.default, x, [product(emit, [batch, m]), k])
        found = emit(aten.mm.default, rows, matrix)
        run.decide(node, "one matrix for all of the batch", became=str(aten.mm.default))
        emit.take_place(emit(aten.reshape.default, found, [batch, m, n]))


def _before_expansion(node: Node) -> Node | None:
    """The matrix that each of a batch is: as no view can be larger than it, it was expanded."""
    shape = value(node).shape[1:]
    while node.target in _VIEWS and value(node).dim() > 2:
        node = node.args[0]  # type: ignore[assignment]
    matrix = value(node).shape
    same = len(matrix) == 2 and all(
        statically_known_true(a == b) for a, b in zip(matrix, shape, strict=True)
    )
    return node if same else None
