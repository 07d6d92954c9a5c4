"""Triton kernel of triangular systems: what is found is taken off all rows behind it at once."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides

TILE = 64  # rows of a tile; free, like the columns of a program: each element is one chain
COLUMNS = 16


@triton.jit
def _picked(v, chosen):
    """[T, N] -> [1, N]: the one row that is chosen, exactly."""
    bits = tl.where(chosen, v.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, 0)[None, :].to(tl.float64, bitcast=True)


@triton.jit
def solve_kernel(
    A, B, X, Y, K, N, sab, sai, saj, sbb, sbi, sbn,
    UPPER: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C columns of a system; X [B, K, N] holds what is found in double, Y is the result."""
    after_others(PDL)
    blocks = tl.cdiv(N, C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks * C + tl.arange(0, C))[None, :].to(tl.int64)
    A += b * sab
    B += b * sbb
    X += b * K * N
    Y += b * K * N
    t = tl.arange(0, T)[:, None]
    zero = tl.zeros([1, 1], tl.int64)
    for first in range(0, K, T):
        step = first + t
        i = (K - 1 - step if UPPER else step).to(tl.int64)
        here = (step < K) & (n < N)
        rest = tl.load(B + i * sbi + n * sbn, mask=here, other=0.0).to(tl.float64)
        for before in range(first):
            j = zero + (K - 1 - before if UPPER else before)
            a = tl.load(A + i * sai + j * saj, mask=step < K, other=0.0).to(tl.float64)
            rest = rest - a * tl.load(X + j * N + n, mask=n < N, other=0.0)
        for place in range(min(T, K - first)):
            at = first + place
            j = zero + (K - 1 - at if UPPER else at)
            found = _picked(rest, t == place)
            if not UNIT:
                found = found / tl.load(A + j * sai + j * saj).to(tl.float64)
            behind = (t > place) & (step < K)
            a = tl.load(A + i * sai + j * saj, mask=behind, other=0.0).to(tl.float64)
            rest = tl.where(t == place, found, tl.where(behind, rest - a * found, rest))
        tl.store(X + i * N + n, rest, mask=here)
        tl.store(Y + i * N + n, rest.to(tl.float32), mask=here)
        tl.debug_barrier()  # the next tiles read X


def solve_triangular(A, B, upper, unitriangular):
    """X with A @ X = B for A [B, K, K], B [B, K, N]; contiguous."""
    out = torch.empty(B.shape, dtype=B.dtype, device=B.device)
    if not out.numel():
        return out
    batch, k, n = B.shape
    tile = min(TILE, max(2, triton.next_power_of_2(k)))
    found = torch.empty(B.shape, dtype=torch.float64, device=B.device)
    launch(
        solve_kernel, batch * triton.cdiv(n, COLUMNS), A, B, found, out, k, n, *strides(A),
        *strides(B), UPPER=upper, UNIT=unitriangular, T=tile, C=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
