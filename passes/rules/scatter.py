"""Sums by index: one op on rows, whichever way they are spelled."""

from __future__ import annotations

import math

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, fill, prims, product, size


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
    """Where the index may have fewer rows than what is added to, the others stay as they are."""
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
        d
        for d, (have, want) in enumerate(zip(shape, places, strict=True))
        if d != dim and not statically_known_true(have == want)
    ]
    parts = [self]
    for d in fewer:
        used = size(emit, index, d, places[d])
        parts.append(emit(aten.slice.Tensor, parts[-1], d, 0, used))
    if fewer and _is_zeros(self):
        used = [size(emit, parts[-1], d, n) for d, n in enumerate(value(parts[-1]).shape)]
        parts[-1] = emit(aten.full.default, used, 0, **self.kwargs)
    out = _in_all_rows(emit, parts[-1], dim, index, src)
    if out is NotImplemented:
        return out
    for d, whole in zip(reversed(fewer), reversed(parts[:-1]), strict=True):
        out = emit(aten.slice_scatter.default, whole, out, d, 0, size(emit, index, d, places[d]))
    return out


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
    """The places of several indices are numbered as those of one axis."""
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if not (accumulate and given) or any(value(i).dtype is torch.bool for i in given.values()):
        return NotImplemented
    rank, axes = value(self).dim(), list(given)
    lengths = [size(emit, self, d, n) for d, n in enumerate(value(self).shape)]
    others = [d for d in range(rank) if d not in given]
    index = _numbered(emit, given, lengths)
    places = [size(emit, index, d, n) for d, n in enumerate(value(index).shape)]
    # Where the axes of the places stand: in front, if those of the indices are not side by side.
    ahead = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0
    rest = [lengths[d] for d in others]
    values = emit(aten.expand.default, values, [*rest[:ahead], *places, *rest[ahead:]])
    behind = ahead + len(places)
    order = [*range(ahead, behind), *range(ahead), *range(behind, len(places) + len(rest))]
    values = emit(aten.permute.default, values, order)
    values = emit(aten.reshape.default, values, [product(emit, places), *rest])
    order = [*axes, *others]
    rows = emit(aten.permute.default, self, order)
    rows = emit(aten.reshape.default, rows, [product(emit, [lengths[d] for d in axes]), *rest])
    out = _on_rows(emit, rows, emit(aten.reshape.default, index, [-1]), values)
    out = emit(aten.reshape.default, out, [lengths[d] for d in order])
    return emit(aten.permute.default, out, [order.index(d) for d in range(rank)])


def _numbered(emit, given, lengths):
    """One index of the elements of several axes, where they lie in the order of the axes."""
    index = outside = None
    for dim, places in given.items():
        wrapped = emit(aten.add.Tensor, places, lengths[dim])
        places = emit(aten.where.self, emit(aten.lt.Scalar, places, 0), wrapped, places)
        if len(given) == 1:
            return places
        below, above = emit(aten.lt.Scalar, places, 0), emit(aten.ge.Scalar, places, lengths[dim])
        wrong = emit(aten.logical_or.default, below, above)
        outside = wrong if outside is None else emit(aten.logical_or.default, outside, wrong)
        if index is not None:
            places = emit(aten.add.Tensor, emit(aten.mul.Tensor, index, lengths[dim]), places)
        index = places
    # A place outside its axis must not become one of the next row: it is an error.
    return fill(emit, index, outside, -1)


RULES = (
    (aten.index_add.default, "index_add", _index_add),
    (aten.scatter_add.default, "index_add", _scatter_add),
    (aten.scatter_reduce.two, "index_add", _scatter_reduce),
    (aten.index_put.default, "index_add", _index_put),
    (aten._unsafe_index_put.default, "index_add", _index_put),
)
