"""Matrix products: one K chain, whichever op spells it."""

from __future__ import annotations

import torch
from torch.fx import Node

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, size
from bicompile.passes.rules.runs import product_of_runs


def tf32(x: Node) -> bool:
    """Whether fp32 products may be rounded to tf32 first: only if the user said so, on a GPU."""
    val = value(x)
    lowered = torch.get_float32_matmul_precision() != "highest"
    return val.device.type == "cuda" and val.dtype is torch.float32 and lowered


def _mm(emit, self, mat2):
    return emit(KERNELS["mm"].op, self, mat2, tf32(self))


def _bmm(emit, self, mat2):
    return emit(KERNELS["bmm"].op, self, mat2, tf32(self))


def _addmm(emit, self, mat1, mat2, *, beta=1, alpha=1):
    return emit(KERNELS["addmm"].op, self, mat1, mat2, float(beta), float(alpha), tf32(mat1))


def _baddbmm(emit, self, batch1, batch2, *, beta=1, alpha=1):
    op = KERNELS["baddbmm"].op
    return emit(op, self, batch1, batch2, float(beta), float(alpha), tf32(batch1))


def _mv(emit, self, vec):
    return emit(aten.squeeze.dim, _mm(emit, self, emit(aten.unsqueeze.default, vec, 1)), 1)


def _dot(emit, self, tensor):
    row = emit(aten.unsqueeze.default, self, 0)
    return emit(aten.squeeze.dim, _mv(emit, row, tensor), 0)


def _addmv(emit, self, mat, vec, *, beta=1, alpha=1):
    if value(self).dim() == 1:
        self = emit(aten.unsqueeze.default, self, 1)
    column = emit(aten.unsqueeze.default, vec, 1)
    return emit(aten.squeeze.dim, _addmm(emit, self, mat, column, beta=beta, alpha=alpha), 1)


def _addbmm(emit, self, batch1, batch2, *, beta=1, alpha=1):
    """The sum over the batch is part of K: element (b, k) of the chain comes at b * K + k."""
    _, m, _ = value(batch1).shape
    _, _, n = value(batch2).shape
    rows = emit(aten.permute.default, batch1, [1, 0, 2])
    rows = emit(aten.reshape.default, rows, [size(emit, rows, 0, m), -1])
    columns = emit(aten.reshape.default, batch2, [-1, size(emit, batch2, 2, n)])
    return _addmm(emit, self, rows, columns, beta=beta, alpha=alpha)


def _grouped_mm(emit, self, mat2, offs=None, bias=None, out_dtype=None):
    """Runs of rows, or of columns, times a matrix each; or runs of both, along K."""
    rank = value(self).dim(), value(mat2).dim()
    op, dtype = KERNELS["grouped_mm"].op, value(self).dtype
    if bias is not None or out_dtype not in (None, dtype):
        return NotImplemented
    if rank == (2, 2):
        rows = emit(aten.permute.default, self, [1, 0])
        return product_of_runs(emit, rows, mat2, offs, _exact(self))
    if rank == (3, 3):
        return _bmm(emit, self, mat2)
    if rank == (2, 3):
        return emit(op, self, mat2, offs, tf32(self))
    rows = emit(aten.permute.default, mat2, [1, 0])
    matrices = emit(aten.permute.default, self, [0, 2, 1])
    return emit(aten.permute.default, emit(op, rows, matrices, offs, tf32(self)), [1, 0])


def _exact(x: Node) -> bool:
    """Whether products of float32 may be of tf32: half types are numbers of it, too."""
    val = value(x)
    return tf32(x) or (val.device.type == "cuda" and val.dtype is not torch.float32)


def _grouped_mm_backward(emit, input, weight, offs, grad_output):
    matrices = emit(aten.permute.default, weight, [0, 2, 1])
    found = emit(KERNELS["grouped_mm"].op, grad_output, matrices, offs, tf32(input))
    return found, product_of_runs(emit, input, grad_output, offs, _exact(input))


RULES = (
    (aten.mm.default, "mm", _mm),
    (aten.bmm.default, "bmm", _bmm),
    (aten.addmm.default, "addmm", _addmm),
    (aten.baddbmm.default, "baddbmm", _baddbmm),
    (aten.mv.default, "mm", _mv),
    (aten.dot.default, "mm", _dot),
    (aten.vdot.default, "mm", _dot),
    (aten.addmv.default, "addmm", _addmv),
    (aten.addbmm.default, "addmm", _addbmm),
    (aten._grouped_mm.default, "grouped_mm", _grouped_mm),
    # What transformers calls where PyTorch's op cannot be compiled.
    ("transformers.grouped_mm_fallback.default", "grouped_mm", _grouped_mm),
    ("transformers.grouped_mm_fallback_backward.default", "grouped_mm", _grouped_mm_backward),
)
