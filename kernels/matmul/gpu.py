"""Triton matmul: one chain over K per output element, so tiles, warps and stages change no bit.

fp32 in full precision ("ieee") sums chains of PART terms, one after the other: a chain of thousands
is less accurate than what PyTorch calls.
"""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.trees import INTERPRET, OPTIONS, strides
from bicompile.kernels.matmul.schedules import PART, schedule

GROUP = tl.constexpr(8)  # rows of tiles that share their columns in L2


@triton.jit
def _tile_of(tile, num_m, num_n):
    """Tile number -> (tile row, tile column), GROUP rows of tiles at a time."""
    per = GROUP * num_n
    first = tile // per * GROUP
    size = tl.minimum(num_m - first, GROUP)
    return first + tile % per % size, tile % per // size


@triton.jit
def _tf32(x):
    """fp32 rounded to nearest in tf32; the tensor cores would cut it off."""
    if not INTERPRET:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return x


@triton.jit
def _add_dot(x, y, acc, KIND: tl.constexpr):
    """acc + x @ y. ieee: a chain of its own for BK terms, then one sum: fewer large roundings."""
    if KIND == "ieee":
        part = tl.dot(x, y, input_precision="ieee")
        acc = tl.math.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)  # "+" becomes one chain
    elif KIND == "tf32":
        acc = tl.dot(_tf32(x), _tf32(y), acc, input_precision="tf32")
    else:
        acc = tl.dot(x, y, acc)
    return acc


@triton.jit
def _chain(
    A, B, rm, rn, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN]: K in rising order from +0; what lies outside the matrices adds 0 * 0."""
    rk = tl.arange(0, BK)
    a = A + rm.to(tl.int64)[:, None] * sam + rk.to(tl.int64)[None, :] * sak
    b = B + rk.to(tl.int64)[:, None] * sbk + rn.to(tl.int64)[None, :] * sbn
    step_a = tl.full([], BK, tl.int64) * sak
    step_b = tl.full([], BK, tl.int64) * sbk
    in_m = rm[:, None] < M
    in_n = rn[None, :] < N
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        if EVEN_K:
            x = tl.load(a, mask=in_m, other=0.0)
            y = tl.load(b, mask=in_n, other=0.0)
        else:
            x = tl.load(a, mask=in_m & (rk[None, :] < K - k), other=0.0)
            y = tl.load(b, mask=in_n & (rk[:, None] < K - k), other=0.0)
        acc = _add_dot(x, y, acc, KIND)
        a += step_a
        b += step_b
    return acc


@triton.jit(do_not_specialize=["M", "beta", "alpha"])
def matmul_kernel(
    A, B, C, Y, M, N, K, sab, sam, sak, sbb, sbk, sbn, scb, scm, scn, beta, alpha,
    HAS_C: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_BETA: tl.constexpr, EVEN_K: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y = alpha * A @ B + beta * C, rounded once; program (matrix, tile)."""
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    batch = (pid // (num_m * num_n)).to(tl.int64)
    tile_m, tile_n = _tile_of(pid % (num_m * num_n), num_m, num_n)
    rm = tile_m * BM + tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    y = _chain(
        A + batch * sab, B + batch * sbb, rm, rn, M, N, K, sam, sak, sbk, sbn,
        BM, BN, BK, EVEN_K, KIND,
    )  # fmt: skip
    row = rm.to(tl.int64)[:, None]
    column = rn.to(tl.int64)[None, :]
    inside = (row < M) & (column < N)
    if HAS_ALPHA:
        y = y * alpha
    if HAS_C:
        c = tl.load(C + batch * scb + row * scm + column * scn, mask=inside, other=0.0)
        c = c.to(tl.float32)
        if HAS_BETA:
            c = c * beta
        y = y + c
    tl.store(Y + (batch * M + row) * N + column, y.to(Y.dtype.element_ty), mask=inside)


def _launch(a, b, c, beta, alpha, tf32, chosen=None):
    """a [B, M, K], b [B, K, N], c None or broadcast to [B, M, N] -> [B, M, N]."""
    (batch, m, k), n = a.shape, b.shape[2]
    out = torch.empty((batch, m, n), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    kind = "half" if a.dtype != torch.float32 else "tf32" if tf32 else "ieee"
    s = chosen or schedule(kind, m)
    assert kind != "ieee" or s.bk == PART
    has_c = c is not None and beta != 0
    c, c_strides = (c, strides(c)) if has_c else (out, (0, 0, 0))
    grid = (batch * triton.cdiv(m, s.bm) * triton.cdiv(n, s.bn),)
    matmul_kernel[grid](
        a, b, c, out, m, n, k, *strides(a), *strides(b), *c_strides, float(beta), float(alpha),
        HAS_C=has_c, HAS_ALPHA=alpha != 1, HAS_BETA=beta != 1, EVEN_K=k % s.bk == 0,
        KIND=kind, BM=s.bm, BN=s.bn, BK=s.bk,
        num_warps=s.warps, num_stages=s.stages, **OPTIONS,
    )  # fmt: skip
    return out


def mm(self, mat2, tf32, chosen=None):
    """self [M, K] @ mat2 [K, N]."""
    return _launch(self[None], mat2[None], None, 0.0, 1.0, tf32, chosen)[0]


def addmm(self, mat1, mat2, beta, alpha, tf32, chosen=None):
    """alpha * mat1 @ mat2 + beta * self, one rounding; beta 0 ignores self."""
    c = self.expand(mat1.shape[0], mat2.shape[1])[None]
    return _launch(mat1[None], mat2[None], c, beta, alpha, tf32, chosen)[0]


def bmm(self, mat2, tf32, chosen=None):
    """self [B, M, K] @ mat2 [B, K, N]."""
    return _launch(self, mat2, None, 0.0, 1.0, tf32, chosen)


def baddbmm(self, batch1, batch2, beta, alpha, tf32, chosen=None):
    """alpha * batch1 @ batch2 + beta * self, one rounding; beta 0 ignores self."""
    c = self.expand(batch1.shape[0], batch1.shape[1], batch2.shape[2])
    return _launch(batch1, batch2, c, beta, alpha, tf32, chosen)
