"""Triton kernels of the reductions: every row in the order of `trees`, any rows per program.

A long row may be cut into parts of some blocks each, for as many programs. What a block adds to a
row are its lanes, which depend on no other block: the programs of the parts write them down
(`lanes`), and one that needs the sum of the row adds them in the pinned order (`joined`). A maximum
is exact in any order, so each part has its own (`extremes`).
"""

import math

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import (
    BLOCK,
    LANES,
    block_max,
    exp,
    load_terms,
    log,
    pair_tree,
    positions,
    power,
    row_shape,
    strides,
)
from bicompile.kernels.reduce.schedules import schedule

CHAIN = 64  # more blocks than these are joined in stages: programs that need the sum are many
NODES = 16  # programs that the first stage has for a row


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _term(x, shift, p, OP: tl.constexpr):
    """What one element adds to the sum, fp64; "square" is rounded to fp32 as x * x is."""
    if OP == "square":
        x = (x * x).to(tl.float64)
    elif OP == "count":
        x = tl.where(x != 0.0, 1.0, 0.0).to(tl.float64)
    elif OP == "exp":
        x = exp(x - shift).to(tl.float64)
    else:
        x = x.to(tl.float64)
        if OP == "abs":
            x = tl.abs(x)
        elif OP == "power":
            x = power(tl.abs(x), tl.cast(p, tl.float64))
        elif OP == "deviation":
            x = x - shift
            x = x * x
    return x


@triton.jit
def block_lanes(
    X, TIMES, row, times_row, here, k0, K, stride, times_stride, shift, p,
    OP: tl.constexpr, FROM: tl.constexpr, STEP: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """[R, L] fp64: what the block at k0 adds to the lanes: its rows FROM, FROM + STEP, ... of J.

    They are folded by halves, so those furthest apart are joined first. Each is loaded on its own:
    then a thread holds few of them, and no other thread has to know them. TIMES: what each term is
    multiplied by.
    """
    MUL: tl.constexpr = OP == "prod"
    if STEP < J:
        x = block_lanes(
            X, TIMES, row, times_row, here, k0, K, stride, times_stride, shift, p,
            OP, FROM, 2 * STEP, R, J, L,
        )  # fmt: skip
        y = block_lanes(
            X, TIMES, row, times_row, here, k0, K, stride, times_stride, shift, p,
            OP, FROM + STEP, 2 * STEP, R, J, L,
        )  # fmt: skip
        x = x * y if MUL else x + y
    else:
        k = k0 + FROM * L + tl.arange(0, L)[None, None, :]
        OTHER: tl.constexpr = float("-inf") if OP == "exp" else 1.0 if MUL else 0.0
        x = _term(load_terms(X, row, here, k, K, stride, OTHER), shift, p, OP)
        if OP == "deviation" or OP == "power":
            x = tl.where(k < K, x, 0.0)
        if TIMES is not None:
            x *= load_terms(TIMES, times_row, here, k, K, times_stride, 0.0).to(tl.float64)
        x = tl.reshape(x, [R, L])
    return x


@triton.jit
def row_sum(
    X, row, here, K, stride, shift, p,
    OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """[R] fp64: the sum (OP "prod": the product) of the terms of R rows, in the pinned order."""
    return row_sum_times(X, None, row, row, here, K, stride, 0, shift, p, OP, R, J, L)


@triton.jit
def row_sum_times(
    X, TIMES, row, times_row, here, K, stride, times_stride, shift, p,
    OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The same of terms that are each multiplied by one of TIMES."""
    MUL: tl.constexpr = OP == "prod"
    acc = tl.full([R, L], 1.0 if MUL else 0.0, tl.float64)
    for k0 in range(0, K, J * L):
        x = block_lanes(
            X, TIMES, row, times_row, here, k0, K, stride, times_stride, shift, p, OP, 0, 1, R, J, L
        )
        acc = acc * x if MUL else acc + x
    return pair_tree(acc, R, L, MUL)


@triton.jit
def row_extreme(
    X, row, here, start, end, stride,
    OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """[R] fp32, of the terms from start to end.

    "max" without NaN (for a shift), or "absmax" / "absmin", which keep NaN.
    """
    if OP == "max":
        START: tl.constexpr = float("-inf")
    elif OP == "absmax":
        START: tl.constexpr = 0.0
    else:
        START: tl.constexpr = float("inf")
    acc = tl.full([R, J, L], START, tl.float32)
    at = positions(J, L)
    for k0 in range(start, end, J * L):
        x = load_terms(X, row, here, k0 + at, end, stride, START)
        if OP == "max":
            acc = tl.maximum(acc, x)
        elif OP == "absmax":
            acc = _nan_max(acc, tl.abs(x))
        else:
            acc = _nan_min(acc, tl.abs(x))
    if OP == "max":
        y = block_max(acc)
    elif OP == "absmax":
        y = tl.reduce(tl.reduce(acc, 1, _nan_max), 1, _nan_max)
    else:
        y = tl.reduce(tl.reduce(acc, 1, _nan_min), 1, _nan_min)
    return y


@triton.jit
def rows_of(M, stride, R: tl.constexpr):
    """Row numbers [R] of this program, which of them exist, and offsets for `load_terms`."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    here = r < M
    return r, here, (r * stride)[:, None, None], here[:, None, None]


# ------------------------------------------------------------------------------ parts of a row


@triton.jit
def part_of(stride, K, blocks, J: tl.constexpr, L: tl.constexpr):
    """The row of this program, its offset for `load_terms`, the terms from start to end."""
    size = blocks * J * L
    parts = tl.cdiv(K, size)
    r = (tl.program_id(0) // parts).to(tl.int64)
    start = tl.program_id(0) % parts * size
    return r, r * stride, start, tl.minimum(start + size, K)


@triton.jit
def top_of(TOPS, r, here, parts, R: tl.constexpr, FINITE: tl.constexpr = False):
    """[R] fp32: the maximum of rows r from those of their parts; FINITE: see `_finite`."""
    row = (r * parts)[:, None, None]
    top = row_extreme(TOPS, row, here[:, None, None], 0, parts, 1, "max", R, 1, 64)
    return _finite(top) if FINITE else top


@triton.jit
def _finite(top):
    """A maximum as a shift of exponents; an infinite one shifts nothing."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _added(
    FROM, here, n, stride, R: tl.constexpr, W: tl.constexpr, MUL: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[R] fp64: W lanes of n blocks are added in rising order of the blocks, then joined.

    AHEAD blocks are read at once; one that is not there changes nothing.
    """
    acc = tl.full([R, W], 1.0 if MUL else 0.0, tl.float64)
    end = tl.full([1, 1], n, tl.int32)
    for first in tl.range(0, n, AHEAD, num_stages=STAGES):
        for i in tl.static_range(AHEAD):
            mask = here & (first + i < end)
            x = tl.load(FROM + (first + i) * stride, mask=mask, other=1.0 if MUL else 0.0)
            acc = acc * x if MUL else acc + x
    return pair_tree(acc, R, W, MUL)


@triton.jit
def joined(FROM, r, here, n, R: tl.constexpr, W: tl.constexpr, MUL: tl.constexpr = False):
    """[R] fp64: the sum (MUL: the product) of rows r from what `lanes` returns, [M, n, W]."""
    at = (r * n * W)[:, None] + tl.arange(0, W)[None, :]
    return _added(FROM + at, here[:, None], n, W, R, W, MUL, 8, 4)


@triton.jit(do_not_specialize=["blocks"])
def extremes_kernel(
    X, OUT, K, sm, sk, blocks,
    OP: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The extreme of a part."""
    after_others(PDL)
    _, row, start, end = part_of(sm, K, blocks, J, L)
    y = row_extreme(X, row, True, start, end, sk, OP, 1, J, L)
    tl.store(OUT + tl.program_id(0) + tl.arange(0, 1), y)


@triton.jit(do_not_specialize=["blocks", "parts"])
def lanes_kernel(
    X, TIMES, SHIFT, OUT, K, sm, sk, tm, tk, blocks, parts, p,
    OP: tl.constexpr, FINITE: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The lanes of each block of a part. SHIFT: of each row the mean, or the maxima of its parts.

    TIMES: what each term is multiplied by.
    """
    after_others(PDL)
    r, row, start, end = part_of(sm, K, blocks, J, L)
    if SHIFT is None:
        shift = 0.0
    elif OP == "exp":
        top = top_of(SHIFT, r + tl.arange(0, 1), tl.full([1], True, tl.int1), parts, 1, FINITE)
        shift = top[:, None, None]
    else:
        shift = tl.load(SHIFT + r)
    to = OUT + r * tl.cdiv(K, J * L) * L + tl.arange(0, L)[None, :]
    for k0 in range(start, end, J * L):
        x = block_lanes(X, TIMES, row, r * tm, True, k0, K, sk, tk, shift, p, OP, 0, 1, 1, J, L)
        tl.store(to + k0 // J, x)


@triton.jit
def join_kernel(
    FROM, OUT, n, MUL: tl.constexpr, L: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr
):
    """One of P nodes of a row: neighbouring lanes over all blocks."""
    after_others(PDL)
    W: tl.constexpr = L // P
    r = (tl.program_id(0) // P).to(tl.int64)
    at = r * n * L + tl.program_id(0) % P * W + tl.arange(0, W)[None, :]
    y = _added(FROM + at, True, n, L, 1, W, MUL, 32, 3)
    tl.store(OUT + tl.program_id(0) + tl.arange(0, 1), y)


def launch_parts(kernel, s, x, *args, **constants):
    """Run a kernel over the parts of the rows of x."""
    programs = x.shape[0] * s.parts(x.shape[1])
    shape = {"J": BLOCK // LANES, "L": LANES}
    launch(kernel, programs, x, *args, **constants, **shape, num_warps=s.warps)


def extremes(x, s, op="max"):
    """[M, parts] fp32: the extremes of the parts."""
    out = torch.empty(x.shape[0], s.parts(x.shape[1]), dtype=torch.float32, device=x.device)
    launch_parts(extremes_kernel, s, x, out, x.shape[1], *strides(x), s.blocks, OP=op)
    return out


def lanes(x, s, op, p=0.0, shift=None, finite=False, times=None):
    """[M, n, W] fp64: the lanes of all blocks of the rows, or nodes that lanes are joined to."""
    m, k = x.shape
    blocks = triton.cdiv(k, BLOCK)
    out = torch.empty(m, blocks, LANES, dtype=torch.float64, device=x.device)
    launch_parts(
        lanes_kernel, s, x, times, shift, out, k, *strides(x),
        *((0, 0) if times is None else strides(times)), s.blocks, s.parts(k), p,
        OP=op, FINITE=finite,
    )  # fmt: skip
    if blocks <= CHAIN:
        return out
    nodes = torch.empty(m, 1, NODES, dtype=torch.float64, device=x.device)
    mul = op == "prod"
    launch(join_kernel, m * NODES, out, nodes, blocks, MUL=mul, L=LANES, P=NODES, num_warps=1)
    return nodes


def blocks_of(sums: torch.Tensor | None) -> tuple[int, int]:
    """(n, W) of what `lanes` returns; of rows that are whole there is nothing."""
    return (0, 1) if sums is None else tuple(sums.shape[1:])


# ------------------------------------------------------------------------------ the reductions


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    X, SUMS, Y, M, K, n, W: tl.constexpr, sm, sk, p, OP: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sum, mean, prod and the norms. SUMS: what `lanes` returns, if rows are in parts."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    if OP == "absmax" or OP == "absmin":
        y = row_extreme(X, row, there, 0, K, sk, OP, R, J, L)
    elif SUMS is None:
        y = row_sum(X, row, there, K, sk, 0.0, p, OP, R, J, L)
    else:
        y = joined(SUMS, r, here, n, R, W, OP == "prod")
    if OP == "mean":
        y = y / K
    elif OP == "deviation":
        y = tl.sqrt(y)
    elif OP == "power":
        y = power(y, 1.0 / tl.cast(p, tl.float64))
    tl.store(Y + r, y.to(Y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M"])
def var_kernel(
    X, SUMS, MEANS, Y, MEAN, M, K, n, W: tl.constexpr, sm, sk, correction, ROOT: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two passes: the mean, then the mean of the squared deviations from it.

    MEANS, SUMS: the results of the first pass and the lanes of the second, if rows are in parts.
    """
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    if SUMS is None:
        mean = row_sum(X, row, there, K, sk, 0.0, 0.0, "sum", R, J, L) / K
        shift = mean[:, None, None]
        var = row_sum(X, row, there, K, sk, shift, 0.0, "deviation", R, J, L)
    else:
        mean = tl.load(MEANS + r, mask=here, other=0.0)
        var = joined(SUMS, r, here, n, R, W)
    var = var / tl.maximum(tl.full([R], 1.0, tl.float64) * K - correction, 0.0)
    if ROOT:
        var = tl.sqrt(var)
    tl.store(Y + r, var.to(Y.dtype.element_ty), mask=here)
    tl.store(MEAN + r, mean.to(MEAN.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M", "parts"])
def logsumexp_kernel(
    X, TOPS, SUMS, Y, M, K, parts, n, W: tl.constexpr, sm, sk,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """log(sum(exp(x - max))) + max; an infinite maximum shifts nothing."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    if SUMS is None:
        top = _finite(row_extreme(X, row, there, 0, K, sk, "max", R, J, L))
        total = row_sum(X, row, there, K, sk, top[:, None, None], 0.0, "exp", R, J, L)
    else:
        top = top_of(TOPS, r, here, parts, R, True)
        total = joined(SUMS, r, here, n, R, W)
    y = log(total.to(tl.float32)) + top
    tl.store(Y + r, y.to(Y.dtype.element_ty), mask=here)


def as_rows(x: torch.Tensor, dim: list[int]) -> tuple[torch.Tensor, list[int]]:
    """x as [M, K] with the reduced axes last, and the shape of the kept axes."""
    kept = [d for d in range(x.ndim) if d not in dim]
    shape = [x.shape[d] for d in kept]
    k = math.prod(x.shape[d] for d in dim)
    x = x.permute(kept + list(dim)).reshape(math.prod(shape), k)
    return (x if k < 2 or x.stride(1) < 2 else x.contiguous()), shape


def _out(self, dim, keepdim, dtype, shape):
    if keepdim:
        shape = [1 if d in dim else n for d, n in enumerate(self.shape)]
    return torch.empty(shape, dtype=dtype, device=self.device)


def row_schedule(x, family="reduce", crowded=False, cut=True):
    """The table's schedule of a family's kernel for x [M, K]; cut: it can have rows in parts."""
    m, k = x.shape
    return schedule(family, m, k, math.prod(row_shape(k)), crowded, cut)


def launch_rows(kernel, x, *args, family="reduce", crowded=False, chosen=None, **constants):
    """Run a row kernel of a family over x [M, K] on the chosen schedule, or one of whole rows."""
    m, k = x.shape
    j, lanes = row_shape(k)
    s = chosen or row_schedule(x, family, crowded, cut=False)
    programs = triton.cdiv(m, s.rows)
    launch(kernel, programs, x, *args, **constants, R=s.rows, J=j, L=lanes, num_warps=s.warps)


def _reduce(self, dim, keepdim, dtype, op, p=0.0, chosen=None):
    x, shape = as_rows(self, dim)
    out = _out(self, dim, keepdim, dtype, shape)
    if x.shape[1] == 0 and op in ("absmax", "absmin"):
        return out.zero_()
    if out.numel():
        _reduce_rows(x, out, op, float(p), chosen or row_schedule(x))
    return out


def _reduce_rows(x, out, op, p, s):
    sums = None
    if s.blocks and op in ("absmax", "absmin"):
        x = extremes(x, s, op)
        s = row_schedule(x, cut=False)
    elif s.blocks:
        sums = lanes(x, s, op, p)
    launch_rows(
        reduce_kernel, x, sums, out, *x.shape, *blocks_of(sums), *strides(x), p, OP=op, chosen=s
    )


def sum(self, dim, keepdim, dtype, chosen=None):
    return _reduce(self, dim, keepdim, dtype, "sum", chosen=chosen)


def mean(self, dim, keepdim, dtype, chosen=None):
    return _reduce(self, dim, keepdim, dtype, "mean", chosen=chosen)


def prod(self, dim, keepdim, dtype, chosen=None):
    return _reduce(self, dim, keepdim, dtype, "prod", chosen=chosen)


_NORMS = {0.0: "count", 1.0: "abs", 2.0: "deviation", math.inf: "absmax", -math.inf: "absmin"}


def norm(self, p, dim, keepdim, dtype, chosen=None):
    op = _NORMS.get(float(p), "power")
    return _reduce(self, dim, keepdim, dtype, op, p, chosen=chosen)


def _var(self, dim, correction, keepdim, root=False, chosen=None):
    x, shape = as_rows(self, dim)
    out, average = (_out(self, dim, keepdim, self.dtype, shape) for _ in range(2))
    if out.numel():
        s = chosen or row_schedule(x)
        sums = means = None
        if s.blocks:
            means = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
            _reduce_rows(x, means, "mean", 0.0, s)
            sums = lanes(x, s, "deviation", shift=means)
        launch_rows(
            var_kernel, x, sums, means, out, average, *x.shape, *blocks_of(sums), *strides(x),
            float(correction), ROOT=root, chosen=s,
        )  # fmt: skip
    return out, average


def var(self, dim, correction, keepdim, chosen=None):
    return _var(self, dim, correction, keepdim, chosen=chosen)[0]


def std(self, dim, correction, keepdim, chosen=None):
    return _var(self, dim, correction, keepdim, root=True, chosen=chosen)[0]


def var_mean(self, dim, correction, keepdim, chosen=None):
    return _var(self, dim, correction, keepdim, chosen=chosen)


def exp_parts(x, s, finite=False):
    """Of rows in parts the maxima of the parts, and the lanes of the sum of exponentials."""
    if not s.blocks:
        return None, None
    tops = extremes(x, s)
    return tops, lanes(x, s, "exp", shift=tops, finite=finite)


def logsumexp(self, dim, keepdim, chosen=None):
    x, shape = as_rows(self, dim)
    out = _out(self, dim, keepdim, self.dtype, shape)
    if out.numel():
        s = chosen or row_schedule(x)
        tops, sums = exp_parts(x, s, finite=True)
        launch_rows(
            logsumexp_kernel, x, tops, sums, out, *x.shape, s.parts(x.shape[1]), *blocks_of(sums),
            *strides(x), chosen=s,
        )  # fmt: skip
    return out
