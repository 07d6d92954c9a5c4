"""Triton kernel of index_add: every output row walks the list of its sources, without atomics."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides


@triton.jit(do_not_specialize=["alpha"])
def index_add_kernel(
    X, ORDER, STARTS, SOURCE, Y, M, sxs, sxm, sks, skm, alpha,
    W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W elements of an output row."""
    after_others(PDL)
    blocks = tl.cdiv(M, W)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * W + tl.arange(0, W).to(tl.int64)
    acc = tl.load(X + s * sxs + m * sxm, mask=m < M, other=0.0).to(tl.float64)
    factor = tl.cast(alpha, tl.float32).to(tl.float64)
    for i in range(tl.load(STARTS + s), tl.load(STARTS + s + 1)):
        row = SOURCE + tl.load(ORDER + i) * sks
        acc += tl.load(row + m * skm, mask=m < M, other=0.0).to(tl.float64) * factor
    y = acc.to(tl.float32).to(Y.dtype.element_ty)
    tl.store(Y + s * M + m, y, mask=m < M)


def index_add(self, index, source, alpha):
    """self [S, M] with each row of source [K, M] * alpha added to its row index [K]."""
    s, m = self.shape
    out = torch.empty((s, m), dtype=self.dtype, device=self.device)
    if out.numel():
        targets, order = torch.sort(index, stable=True)
        rows = torch.arange(s + 1, dtype=index.dtype, device=index.device)
        starts = torch.searchsorted(targets, rows)
        width = min(triton.next_power_of_2(m), 2048)
        launch(
            index_add_kernel, s * triton.cdiv(m, width), self, order, starts, source, out, m,
            *strides(self), *strides(source), float(alpha), W=width,
            num_warps=8 if width > 1024 else 4 if width > 128 else 1,
        )  # fmt: skip
    return out
