"""A sweep with two schedules that are right in their values and not in their class.

Declared as a family declares its own, so that `bicompile verify` has something to find.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.trees import OPTIONS, rsqrt
from bicompile.kernels.matmul.sweep import classes as matmul_classes
from bicompile.kernels.norm.sweep import classes as norm_classes


@dataclass(frozen=True)
class SplitK:
    """A matmul whose halves of K are summed apart."""

    bm: int
    bn: int
    bk: int


@dataclass(frozen=True)
class LayoutSum:
    """A norm whose sum is a `tl.sum`: its order follows the layout, so the warps."""

    rows: int
    warps: int


@triton.jit
def split_k_kernel(
    A, B, Y, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    half = tl.cdiv(K, 2)
    for part in tl.static_range(2):
        acc = tl.zeros([BM, BN], tl.float32)
        end = tl.minimum(half * (part + 1), K)
        for k0 in range(half * part, end, BK):
            rk = k0 + tl.arange(0, BK)
            in_k = rk < end
            a = tl.load(A + rm[:, None] * sam + rk[None, :] * sak,
                        mask=(rm < M)[:, None] & in_k[None, :], other=0.0)  # fmt: skip
            b = tl.load(B + rk[:, None] * sbk + rn[None, :] * sbn,
                        mask=in_k[:, None] & (rn < N)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(a, b, acc)
        total += acc
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(Y + rm[:, None] * N + rn[None, :], total.to(Y.dtype.element_ty), mask=inside)


def split_k(x, s):
    a, b = x[0], x[1].t()
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    split_k_kernel[(triton.cdiv(m, s.bm), triton.cdiv(n, s.bn))](
        a, b, out, m, n, k, *a.stride(), *b.stride(), BM=s.bm, BN=s.bn, BK=s.bk, **OPTIONS
    )
    return out


@triton.jit
def layout_sum_kernel(
    X, W, Y, M, K, sm, sk, sw, eps, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, C)
    inside = (r < M)[:, None] & (k < K)[None, :]
    x = tl.load(X + r[:, None] * sm + k[None, :] * sk, mask=inside, other=0.0).to(tl.float32)
    y = x * rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    w = tl.load(W + k * sw, mask=k < K, other=0.0).to(tl.float32)
    y = y.to(Y.dtype.element_ty).to(tl.float32) * w[None, :]
    tl.store(Y + r[:, None] * K + k[None, :], y.to(Y.dtype.element_ty), mask=inside)


def layout_sum(x, s):
    x, w = x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    layout_sum_kernel[(triton.cdiv(len(x), s.rows),)](
        x, w, out, *x.shape, *x.stride(), *w.stride(), 1e-6,
        R=s.rows, C=triton.next_power_of_2(x.shape[1]), num_warps=s.warps, **OPTIONS,
    )  # fmt: skip
    return out


PLANTED = {
    "half": (SplitK(16, 32, 64), split_k),
    "block 1024": (LayoutSum(1, 4), layout_sum),
}


def classes(depth):
    """The real classes with a schedule more, on the problems that it can run."""
    for real in (*matmul_classes(depth), *norm_classes(depth)):
        if real.name in PLANTED:
            schedule, run = PLANTED[real.name]
            problems = [
                replace(p, run=_with(p.run, schedule, run))
                for p in real.problems
                if p.name.startswith(("mm ", "rms_norm float"))
            ]
            yield replace(real, schedules=(*real.schedules, schedule), problems=problems)


def _with(real, planted, run):
    return lambda x, s: (run if s == planted else real)(x, s)
