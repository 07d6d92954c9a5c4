"""Triton kernels of the reductions, of whole rows or of rows in parts."""

import math

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.trees import log, power, strides
from bicompile.kernels.reduce.parts import (
    blocks_of,
    exp_parts,
    extremes,
    finite_shift,
    joined,
    lanes,
    top_of,
)
from bicompile.kernels.reduce.rows import (
    as_rows,
    launch_rows,
    row_extreme,
    row_schedule,
    row_sum,
    rows_of,
)


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
        top = finite_shift(row_extreme(X, row, there, 0, K, sk, "max", R, J, L))
        total = row_sum(X, row, there, K, sk, top[:, None, None], 0.0, "exp", R, J, L)
    else:
        top = top_of(TOPS, r, here, parts, R, True)
        total = joined(SUMS, r, here, n, R, W)
    y = log(total.to(tl.float32)) + top
    tl.store(Y + r, y.to(Y.dtype.element_ty), mask=here)


def _out(self, dim, keepdim, dtype, shape):
    if keepdim:
        shape = [1 if d in dim else n for d, n in enumerate(self.shape)]
    return torch.empty(shape, dtype=dtype, device=self.device)


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
