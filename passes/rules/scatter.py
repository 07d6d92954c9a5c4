"""Sums by index: one op on rows, whichever way they are spelled."""

from __future__ import annotations

import math
from operator import sub

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, fill, prims, size


def _index_add(emit, self, dim, index, source, *, alpha=1):
    rank = value(self).dim()
    if rank == 0 or value(source).dim() != rank:
        return NotImplemented
    order = [dim % rank, *(d for d in range(rank) if d != dim % rank)]
    rows, added = (emit(aten.permute.default, t, order) for t in (self, source))
    index = emit(aten.reshape.default, index, [-1])
    out = _on_rows(emit, rows, index, added, alpha)
    back = [order.index(d) for d in range(rank)]
    return emit(aten.permute.default, out, back)


def _on_rows(emit, self, index, source, alpha=1):
    """index_add along the first axis."""
    shape = [size(emit, self, d, n) for d, n in enumerate(value(self).shape)]
    first = value(source).shape[0]
    width = math.prod(value(self).shape[1:])
    width = width if isinstance(width, int) else -1  # which says nothing if there are no rows
    rows = emit(aten.reshape.default, self, [shape[0], width])
    added = emit(aten.reshape.default, source, [size(emit, source, 0, first), width])
    out = emit(KERNELS["index_add"].op, rows, index, added, float(alpha))
    return emit(aten.reshape.default, out, shape)


def _one_place_of_each_row(emit, self, dim, index, src):
    """The gradient of a gather of one element (a loss by class): zeros, and `src` in its place.

    ``where(arange == index, src, 0)``, or None where it is something else.
    """
    shape = value(self).shape
    rows = [d for d in range(len(shape)) if d != dim]
    fits = _is_zeros(self) and all(
        statically_known_true(value(t).shape[d] == shape[d]) for t in (index, src) for d in rows
    )
    if not fits or not all(statically_known_true(value(t).shape[dim] == 1) for t in (index, src)):
        return None
    like = {"dtype": torch.int64, "device": value(self).device, "requires_grad": False}
    length = size(emit, self, dim, shape[dim])
    place = emit(prims.iota.default, length, start=0, step=1, **like)
    place = emit(aten.reshape.default, place, [-1 if d == dim else 1 for d in range(len(shape))])
    return emit(aten.where.self, emit(aten.eq.Tensor, place, index), src, self)


def _is_zeros(x):
    return x.target is aten.full.default and x.args[1] == 0


def _scatter_add(emit, self, dim, index, src):
    """Where the index may have fewer rows than what is added to zeros, the others stay zeros."""
    rank = value(self).dim()
    if rank == 0:
        return NotImplemented
    dim %= rank
    shape, places = value(self).shape, value(index).shape
    if any(isinstance(n, int) and n == 0 for n in places):
        return emit(aten.clone.default, self)
    for d, (used, given) in enumerate(zip(places, value(src).shape, strict=True)):
        if not statically_known_true(used == given):  # of a larger source, the first are added
            src = emit(aten.slice.Tensor, src, d, 0, size(emit, index, d, used))
    fewer = [
        d != dim and not statically_known_true(have == want)
        for d, (have, want) in enumerate(zip(shape, places, strict=True))
    ]
    if not any(fewer) or not _is_zeros(self):
        return _in_all_rows(emit, self, dim, index, src)
    sizes = [size(emit, self, d, n) for d, n in enumerate(shape)]
    used = [size(emit, index, d, n) if fewer[d] else sizes[d] for d, n in enumerate(places)]
    out = _in_all_rows(emit, emit(aten.full.default, used, 0, **self.kwargs), dim, index, src)
    if out is NotImplemented:
        return out
    behind = [emit(sub, sizes[d], used[d]) if fewer[d] else 0 for d in reversed(range(rank))]
    return emit(aten.constant_pad_nd.default, out, [n for b in behind for n in (0, b)], 0.0)


def _in_all_rows(emit, self, dim, index, src):
    """Every element is a row of one: element (r, s) of [R, S] is row r * S + s."""
    rank = value(self).dim()
    if (one := _one_place_of_each_row(emit, self, dim, index, src)) is not None:
        return one
    shapes = (value(t).shape for t in (self, index, src))
    for d, (ours, places, theirs) in enumerate(zip(*shapes, strict=True)):
        if not statically_known_true(places == theirs) or (
            d != dim and not statically_known_true(ours == places)
        ):
            return NotImplemented
    order = [*(d for d in range(rank) if d != dim), dim]
    whole, index, src = (emit(aten.permute.default, t, order) for t in (self, index, src))
    kept = [size(emit, whole, d, n) for d, n in enumerate(value(whole).shape)]
    length = size(emit, index, rank - 1, value(index).shape[-1])
    index = emit(aten.reshape.default, index, [-1, length])
    count = size(emit, index, 0, value(index).shape[0])
    like = {"dtype": torch.int64, "device": value(self).device, "requires_grad": False}
    row = emit(prims.iota.default, count, start=0, step=1, **like)
    start = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, row, 1), kept[-1])
    below, above = emit(aten.lt.Scalar, index, 0), emit(aten.ge.Scalar, index, kept[-1])
    outside = emit(aten.logical_or.default, below, above)
    index = emit(aten.add.Tensor, index, start)
    # A place outside its row must not become one of the next row: it is an error.
    index = fill(emit, index, outside, -1)
    index = emit(aten.reshape.default, index, [-1])
    ones = [emit(aten.reshape.default, t, [-1, 1]) for t in (whole, src)]
    out = emit(KERNELS["index_add"].op, ones[0], index, ones[1], 1.0)
    back = [order.index(d) for d in range(rank)]
    return emit(aten.permute.default, emit(aten.reshape.default, out, kept), back)


def _scatter_reduce(emit, self, dim, index, src, reduce, include_self=True):
    """Sums; a target that does not count itself starts from 0."""
    if reduce != "sum":
        return NotImplemented
    if not include_self:
        self = emit(aten.scatter.value, self, dim, index, 0)
    return _scatter_add(emit, self, dim, index, src)


def _index_put(emit, self, indices, values, accumulate=False, unsafe=False):
    """With one index, of the first axis."""
    index = indices[0] if len(indices) == 1 else None
    if not accumulate or index is None or value(index).dtype is torch.bool:
        return NotImplemented
    places = [size(emit, index, d, n) for d, n in enumerate(value(index).shape)]
    rest = [size(emit, self, d, n) for d, n in enumerate(value(self).shape) if d]
    length = size(emit, self, 0, value(self).shape[0])
    values = emit(aten.expand.default, values, [*places, *rest])
    values = emit(aten.reshape.default, values, [-1, *rest])
    wrapped = emit(aten.add.Tensor, index, length)
    index = emit(aten.where.self, emit(aten.lt.Scalar, index, 0), wrapped, index)
    return _on_rows(emit, self, emit(aten.reshape.default, index, [-1]), values)


RULES = (
    (aten.index_add.default, "index_add", _index_add),
    (aten.scatter_add.default, "index_add", _scatter_add),
    (aten.scatter_reduce.two, "index_add", _scatter_reduce),
    (aten.index_put.default, "index_add", _index_put),
    (aten._unsafe_index_put.default, "index_add", _index_put),
)
