"""Products of runs of rows: the gradient of the matrices of a mixture of experts.

The rows of a run are cut into parts of one length, the last of them filled up with zeros; a part is
an element of a batch of products, and the products of a run's parts are added in their order. ::

    offs = [3, 3, 8], parts of 4 rows:  part 0: rows 0 1 2 and a zero row, of run 0
                                        part 1: rows 3 4 5 6, of run 2
                                        part 2: row 7 and three zero rows, of run 2

How many parts there are depends on the data; there is room for as many as there may be.
"""

from __future__ import annotations

from operator import add, floordiv

import torch

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, prims, rows_of_zeros, size

SHORT, LONG = 256, 1024  # pinned: rows of a part, between these as many as a matrix is narrow


def product_of_runs(emit, rows, columns, offs, tf32):
    """Sums over the rows s of a run of rows[s, m] * columns[s, n].

    rows: [S, M], columns: [S, N], offs: ends of runs [G] -> [G, M, N], rounded once.
    """
    dtype, device = value(rows).dtype, value(rows).device
    height, width = (int(value(t).shape[1]) for t in (rows, columns))
    groups = int(value(offs).shape[0])
    part = min(max(min(height, width), SHORT), LONG)
    total = size(emit, rows, 0, value(rows).shape[0])
    if isinstance(total, int):
        room = total // part + groups
    else:
        room = emit(add, emit(floordiv, total, part), groups)
    run, places = _places(emit, offs, groups, total, room, part, device)

    def parts(x):
        """[room, part, ...] in float32; behind the last row there is one of zeros."""
        x = emit(aten.constant_pad_nd.default, x, [0, 0, 0, 1], 0.0)
        return _wide(emit, emit(aten.index.Tensor, x, [places]))

    left = emit(aten.permute.default, parts(rows), [0, 2, 1])
    found = emit(KERNELS["bmm"].op, left, parts(columns), tf32)
    found = emit(aten.reshape.default, found, [room, height * width])
    start = rows_of_zeros(emit, groups + 1, height * width, value(found))
    found = emit(KERNELS["index_add"].op, start, run, found, 1.0)
    found = emit(aten.slice.Tensor, found, 0, 0, groups)
    found = emit(aten.reshape.default, found, [groups, height, width])
    if dtype is torch.float32:
        return found
    return emit(prims.convert_element_type.default, found, dtype)


def _wide(emit, x):
    if value(x).dtype is torch.float32:
        return x
    return emit(prims.convert_element_type.default, x, torch.float32)


def _places(emit, offs, groups, total, room, part, device):
    """The run of each part [room], `groups` where there is none, and its rows [room, part]."""
    like = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    ends = emit(prims.convert_element_type.default, offs, torch.int64)
    zero = emit(aten.full.default, [1], 0, dtype=torch.int64, device=device)
    # A run more, of no rows, is that of the parts that are too many.
    ends = emit(aten.cat.default, [ends, emit(aten.slice.Tensor, ends, 0, -1)])
    begins = emit(aten.cat.default, [zero, emit(aten.slice.Tensor, ends, 0, 0, groups)])
    lengths = emit(aten.sub.Tensor, ends, begins)
    counts = emit(aten.add.Tensor, lengths, part - 1)
    counts = emit(aten.div.Scalar_mode, counts, part, rounding_mode="floor")
    behind = emit(aten.cumsum.default, counts, 0)
    number = emit(prims.iota.default, room, **like)
    column = emit(aten.unsqueeze.default, number, 1)
    passed = emit(aten.ge.Tensor, column, emit(aten.slice.Tensor, behind, 0, 0, groups))
    run = emit(aten.sum.dim_IntList, passed, [1])

    def of_run(x):
        return emit(aten.index.Tensor, x, [run])

    within = emit(aten.sub.Tensor, number, of_run(emit(aten.sub.Tensor, behind, counts)))
    first = emit(aten.add.Tensor, of_run(begins), emit(aten.mul.Tensor, within, part))
    place = emit(prims.iota.default, part, **like)
    place = emit(aten.add.Tensor, emit(aten.unsqueeze.default, first, 1), place)
    end = emit(aten.unsqueeze.default, of_run(ends), 1)
    last = emit(aten.scalar_tensor.default, total, dtype=torch.int64, device=device)
    return run, emit(aten.where.self, emit(aten.lt.Tensor, place, end), place, last)
