"""Triton kernel of the scans: a row in blocks, a block in runs, a run in halves of halves."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import exp, log1p, strides

BLOCK = 1024  # pinned: elements of one block
LANES = tl.constexpr(32)  # pinned: elements of one run
TILE = 2048  # elements of one program at a time; free, as rows are independent


@triton.jit
def _split_product(x):
    """x as (e, m) with x = m * 2^e and |m| in [sqrt(1/2), sqrt(2)); zero, inf and NaN as (0, x).

    A product of 1024 such m cannot leave the range of a double, of 1024 floats it can: and a run
    that overflows by itself may follow one that is 0.
    """
    bits = x.to(tl.int64, bitcast=True)
    e = ((bits & 0x7FFFFFFFFFFFFFFF) - 0x3FE6A09E667F3BCD) >> 52
    ordinary = (x != 0.0) & (tl.abs(x) < float("inf"))
    e = tl.where(ordinary, e, 0)
    return e.to(tl.float64), (bits - (e << 52)).to(tl.float64, bitcast=True)


@triton.jit
def _scaled(e, m):
    """m * 2^e, for e a whole number of any size; exact in the range of float32."""
    more, m = _split_product(m)
    e = tl.minimum(tl.maximum(e + more, -600.0), 600.0).to(tl.int64)
    return m * ((e + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _leaf(x, OP: tl.constexpr):
    """What stands for one element: a pair (a, b), see `_join`; in a sum, a has no meaning."""
    if OP == "sum":
        a, b = x, x + 0.0  # from +0 on
    elif OP == "product":
        a, b = _split_product(x)
    else:
        a, b = tl.where(x == x, x, float("-inf")), tl.where(x == x, 0.0, x)
    return a, b


@triton.jit
def _join(a, b, later_a, later_b, OP: tl.constexpr):
    """What stands for two neighbouring runs.

    In a product, (a, b) is b * 2^a.  In a logarithm, a is the maximum and b the sum of exp(x - a)
    less the 1 of the maximum itself.
    """
    if OP == "sum":
        a, b = later_a, b + later_b
    elif OP == "product":
        a, b = a + later_a, b * later_b
    else:
        # Equal maxima may be infinite and have no difference.
        e = exp(tl.where(a == later_a, 0.0, tl.minimum(a - later_a, later_a - a)))
        b = tl.where(a >= later_a, b + (later_b + 1.0) * e, later_b + (b + 1.0) * e)
        a = tl.maximum(a, later_a)
    return a, b


@triton.jit
def _picked(v, chosen, AXIS: tl.constexpr):
    """The one element along an axis that is chosen, exactly: as bits, for -0 + 0 is not -0."""
    bits = tl.where(chosen, v.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, AXIS).to(tl.float64, bitcast=True)


@triton.jit
def _run_scan(a, b, OP: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """[R, W] -> [R, W] running values and [R, 1] the whole run's: halves, width by width."""
    end_a, end_b = a, b  # of each part of the width reached
    for i in tl.static_range(5):
        if (W >> (i + 1)) >= 1:
            side = tl.arange(0, 2)[None, None, :]
            end_a = tl.reshape(end_a, [R, W >> (i + 1), 2])
            end_b = tl.reshape(end_b, [R, W >> (i + 1), 2])
            left_a, left_b = _picked(end_a, side == 0, 2), _picked(end_b, side == 0, 2)
            right_a, right_b = _picked(end_a, side == 1, 2), _picked(end_b, side == 1, 2)
            a = tl.reshape(a, [R, W >> (i + 1), 2 << i])
            b = tl.reshape(b, [R, W >> (i + 1), 2 << i])
            joined_a, joined_b = _join(left_a[:, :, None], left_b[:, :, None], a, b, OP)
            right = (tl.arange(0, 2 << i) >= (1 << i))[None, None, :]
            a = tl.reshape(tl.where(right, joined_a, a), [R, W])
            b = tl.reshape(tl.where(right, joined_b, b), [R, W])
            end_a, end_b = _join(left_a, left_b, right_a, right_b, OP)
    return a, b, end_a, end_b


@triton.jit
def _shifted(v, first, J: tl.constexpr):
    """[R, J] -> [R, J]: the element before each; `first` before all."""
    j = tl.arange(0, J)
    before = _picked(v[:, None, :], (j[None, :] == j[:, None] - 1)[None, :, :], 2)
    return tl.where(j[None, :] == 0, first, before)


@triton.jit
def _block_scan(
    before_a, before_b, a, b, first_a, first_b,
    OP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """[R, W] -> [R, W] running values behind [R, 1] all before, and [R, 1] what is now before."""
    L: tl.constexpr = min(W, LANES)
    J: tl.constexpr = W // L
    a, b, end_a, end_b = _run_scan(
        tl.reshape(a, [R * J, L]), tl.reshape(b, [R * J, L]), OP, R * J, L
    )
    end_a, end_b = tl.reshape(end_a, [R, J]), tl.reshape(end_b, [R, J])
    runs_a, runs_b, end_a, end_b = _run_scan(end_a, end_b, OP, R, J)
    runs_a, runs_b = _shifted(runs_a, first_a, J), _shifted(runs_b, first_b, J)
    runs_a, runs_b = _join(before_a, before_b, runs_a, runs_b, OP)
    a, b = tl.reshape(a, [R, J, L]), tl.reshape(b, [R, J, L])
    a, b = _join(runs_a[:, :, None], runs_b[:, :, None], a, b, OP)
    before_a, before_b = _join(before_a, before_b, end_a, end_b, OP)
    return tl.reshape(a, [R, W]), tl.reshape(b, [R, W]), before_a, before_b


@triton.jit(do_not_specialize=["M"])
def scan_kernel(
    X, Y, M, K, N, sm, sk, sn,
    OP: tl.constexpr, R: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R of the M * N rows of x [M, K, N]; y is contiguous."""
    after_others(PDL)
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    here = (i < M.to(tl.int64) * N)[:, None]
    m, n = i // N, i % N
    x_row, y_row = (m * sm + n * sn)[:, None], (m * K * N + n)[:, None]
    # Nothing, exactly: joined with a run it leaves the run.
    NOTHING_A: tl.constexpr = float("-inf") if OP == "logsumexp" else 0.0
    NOTHING_B: tl.constexpr = -1.0 if OP == "logsumexp" else 1.0 if OP == "product" else 0.0
    before_a = tl.full([R, 1], NOTHING_A, tl.float64)
    before_b = tl.full([R, 1], NOTHING_B, tl.float64)
    for k0 in range(0, K, W):
        k = (k0 + tl.arange(0, W))[None, :].to(tl.int64)
        there = here & (k < K)
        x = tl.load(X + x_row + k * sk, mask=there, other=0.0).to(tl.float64)
        a, b = _leaf(x, OP)
        a, b, before_a, before_b = _block_scan(
            before_a, before_b, a, b, NOTHING_A, NOTHING_B, OP, R, W
        )
        y = b
        if OP == "product":
            y = _scaled(a, b)
            more, before_b = _split_product(before_b)
            before_a += more
        elif OP == "logsumexp":
            y = log1p(b) + a
        tl.store(Y + y_row + k * N, y.to(tl.float32).to(Y.dtype.element_ty), mask=there)


def _scan(self, dim, dtype, op):
    out = torch.empty(self.shape, dtype=dtype, device=self.device)
    if not out.numel():
        return out
    x = self.reshape(1) if self.ndim == 0 else self
    dim %= x.ndim
    x = x.flatten(dim + 1) if dim + 1 < x.ndim else x.unsqueeze(-1)
    x = x.flatten(0, dim - 1) if dim > 0 else x.unsqueeze(0)
    m, k, n = x.shape
    # A short row's block is the beginning of a long one's: what lies behind changes nothing.
    w = min(triton.next_power_of_2(k), BLOCK)
    rows = max(1, TILE // w // 2) if w < BLOCK else 1
    programs = triton.cdiv(m * n, rows)
    launch(scan_kernel, programs, x, out, m, k, n, *strides(x), OP=op, R=rows, W=w, num_warps=4)
    return out


def cumsum(self, dim, dtype):
    """Running sums along dim; contiguous."""
    return _scan(self, dim, dtype, "sum")


def cumprod(self, dim, dtype):
    """Running products along dim; contiguous."""
    return _scan(self, dim, dtype, "product")


def logcumsumexp(self, dim, dtype):
    """Logarithms of running sums of exponentials along dim; contiguous."""
    return _scan(self, dim, dtype, "logsumexp")
