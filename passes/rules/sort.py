"""Order of elements: exact, ties pinned."""

from __future__ import annotations

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, outputs


def _topk(emit, self, k, dim=-1, largest=True, sorted=True):
    rank = value(self).dim()
    if rank == 0:
        return NotImplemented
    return outputs(emit, emit(KERNELS["topk"].op, self, k, dim % rank, largest), 2)


RULES = ((aten.topk.default, "topk", _topk, True),)
