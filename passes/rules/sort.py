"""Order of elements: exact, ties pinned."""

from __future__ import annotations

import math

import torch

from bicompile.graph import constant, value
from bicompile.passes.rules.common import KERNELS, aten, fill, outputs, prims


def _topk(emit, self, k, dim=-1, largest=True, sorted=True):
    rank = value(self).dim()
    if rank == 0:
        return NotImplemented
    return outputs(emit, emit(KERNELS["topk"].op, self, k, dim % rank, largest), 2)


def _kthvalue(emit, self, k, dim=-1, keepdim=False):
    """The last of the k smallest; of equal ones the lowest position counts as smaller."""
    k = constant(k)
    first = _topk(emit, self, k, dim, False)
    if first is NotImplemented:
        return first
    d = dim % value(self).dim()
    if keepdim:
        return tuple(emit(aten.slice.Tensor, t, d, k - 1, k) for t in first)
    return tuple(emit(aten.select.int, t, d, k - 1) for t in first)


def _median(emit, self, dim, keepdim=False):
    """The lower of the two in the middle; where there is a NaN, the first NaN."""
    rank = value(self).dim()
    count = value(self).shape[dim] if rank else 0
    if not isinstance(count, int) or count == 0:
        return NotImplemented
    values, indices = _kthvalue(emit, self, (count + 1) // 2, dim, keepdim)
    if not value(self).dtype.is_floating_point:
        return values, indices
    nan = emit(aten.isnan.default, self)
    found = emit(aten.any.dim, nan, dim, keepdim)
    number = emit(prims.convert_element_type.default, nan, torch.int32)
    where = emit(aten.argmax.default, number, dim, keepdim)
    return fill(emit, values, found, math.nan), emit(aten.where.self, found, where, indices)


def _median_of_all(emit, self):
    both = _median(emit, emit(aten.reshape.default, self, [-1]), 0)
    return both if both is NotImplemented else both[0]


RULES = (
    (aten.topk.default, "topk", _topk, True),
    (aten.kthvalue.default, "topk", _kthvalue, True),
    (aten.median.dim, "topk", _median, True),
    (aten.median.default, "topk", _median_of_all, True),
)
