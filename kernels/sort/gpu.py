"""Triton kernel of topk: the maximum of elements and positions packed into integers."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides

WIDTH, COUNT = 4096, 64  # up to so many elements and results a row stays in registers


@triton.jit
def key(x):
    """A number as an integer: equal for equal ones, larger for larger ones, largest for NaN."""
    f = x.to(tl.float32)
    bits = f.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    return tl.where(f != f, 0x7FFFFFFF, tl.where(bits < 0, -magnitude, magnitude)).to(tl.int64)


@triton.jit(do_not_specialize=["M"])
def topk_kernel(
    X, V, I, M, K, sm, sk,
    TOP: tl.constexpr, LARGEST: tl.constexpr, R: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOP times the largest of each of R rows of up to W elements."""
    after_others(PDL)
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    here = r < M
    k = tl.arange(0, W)[None, :]
    inside = here[:, None] & (k < K)
    x = tl.load(X + (r * sm)[:, None] + k.to(tl.int64) * sk, mask=inside, other=0.0)
    order = key(x)
    if not LARGEST:
        order = -order
    # The position runs backwards: of equal elements the first is the largest.
    packed = order * 4294967296 + (W - 1 - k).to(tl.int64)
    nothing = tl.full([1, 1], -9223372036854775807, tl.int64)
    packed = tl.where(inside, packed, nothing)
    for i in tl.static_range(TOP):
        best = tl.max(packed, 1)
        index = W - 1 - (best & 0xFFFFFFFF)
        value = tl.load(X + r * sm + index * sk, mask=here, other=0.0)
        tl.store(V + r * TOP + i, value, mask=here)
        tl.store(I + r * TOP + i, index, mask=here)
        packed = tl.where(packed == best[:, None], nothing, packed)


def topk(self, k, dim, largest):
    """The first k along dim, in descending order or ascending; (values, positions)."""
    n = self.shape[dim]
    if not self.dtype.is_floating_point or self.dtype == torch.float64 or n > WIDTH or k > COUNT:
        values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
        return tuple(t.narrow(dim, 0, k).contiguous() for t in (values, indices))
    x = self.movedim(dim, -1)
    shape = (*x.shape[:-1], k)
    values = torch.empty(shape, dtype=self.dtype, device=self.device)
    indices = torch.empty(shape, dtype=torch.int64, device=self.device)
    if values.numel():
        rows = x.reshape(-1, n)
        width = triton.next_power_of_2(n)
        together = max(1, 1024 // width)
        launch(
            topk_kernel, triton.cdiv(len(rows), together), rows, values, indices, *rows.shape,
            *strides(rows), TOP=k, LARGEST=largest, R=together, W=width,
            num_warps=4 if width > 128 else 1,
        )  # fmt: skip
    return tuple(t.movedim(-1, dim).contiguous() for t in (values, indices))
