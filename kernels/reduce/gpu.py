"""Triton kernels of the reductions: every row in the order of `trees`, any rows per program."""

import math

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import (
    block_max,
    exp,
    fold_rows,
    load_terms,
    log,
    pair_tree,
    positions,
    power,
    row_shape,
    strides,
)
from bicompile.kernels.reduce.schedules import schedule


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
def row_sum(
    X, row, here, K, stride, shift, p,
    OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """[R] fp64: the sum (OP "prod": the product) of the terms of R rows, in the pinned order."""
    MUL: tl.constexpr = OP == "prod"
    acc = tl.full([R, L], 1.0 if MUL else 0.0, tl.float64)
    at = positions(J, L)
    for k0 in range(0, K, J * L):
        k = k0 + at
        x = _term(load_terms(X, row, here, k, K, stride, 0.0), shift, p, OP)
        x = fold_rows(tl.where(k < K, x, 1.0 if MUL else 0.0), R, J, L, MUL)
        acc = acc * x if MUL else acc + x
    return pair_tree(acc, R, L, MUL)


@triton.jit
def row_extreme(
    X, row, here, K, stride, OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr
):
    """[R] fp32: "max" without NaN (for a shift), or "absmax" / "absmin", which keep NaN."""
    if OP == "max":
        START: tl.constexpr = float("-inf")
    elif OP == "absmax":
        START: tl.constexpr = 0.0
    else:
        START: tl.constexpr = float("inf")
    acc = tl.full([R, J, L], START, tl.float32)
    at = positions(J, L)
    for k0 in range(0, K, J * L):
        x = load_terms(X, row, here, k0 + at, K, stride, START)
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


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    X, Y, M, K, sm, sk, p,
    OP: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """sum, mean, prod and the norms."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    if OP == "absmax" or OP == "absmin":
        y = row_extreme(X, row, there, K, sk, OP, R, J, L)
    else:
        y = row_sum(X, row, there, K, sk, 0.0, p, OP, R, J, L)
    if OP == "mean":
        y = y / K
    elif OP == "deviation":
        y = tl.sqrt(y)
    elif OP == "power":
        y = power(y, 1.0 / tl.cast(p, tl.float64))
    tl.store(Y + r, y.to(Y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M"])
def var_kernel(
    X, Y, MEAN, M, K, sm, sk, correction,
    ROOT: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Two passes: the mean, then the mean of the squared deviations from it."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    mean = row_sum(X, row, there, K, sk, 0.0, 0.0, "sum", R, J, L) / K
    shift = mean[:, None, None]
    var = row_sum(X, row, there, K, sk, shift, 0.0, "deviation", R, J, L)
    var = var / tl.maximum(tl.full([R], 1.0, tl.float64) * K - correction, 0.0)
    if ROOT:
        var = tl.sqrt(var)
    tl.store(Y + r, var.to(Y.dtype.element_ty), mask=here)
    tl.store(MEAN + r, mean.to(MEAN.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M"])
def logsumexp_kernel(
    X, Y, M, K, sm, sk, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr
):
    """log(sum(exp(x - max))) + max; an infinite maximum shifts nothing."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    top = row_extreme(X, row, there, K, sk, "max", R, J, L)
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    total = row_sum(X, row, there, K, sk, top[:, None, None], 0.0, "exp", R, J, L).to(tl.float32)
    tl.store(Y + r, (log(total) + top).to(Y.dtype.element_ty), mask=here)


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


def launch_rows(kernel, x, *args, family="reduce", crowded=False, chosen=None, **constants):
    """Run a row kernel of a family over x [M, K] on the table's (or the chosen) schedule."""
    m, k = x.shape
    j, lanes = row_shape(k)
    s = chosen or schedule(family, m, k, j * lanes, crowded)
    programs = triton.cdiv(m, s.rows)
    launch(kernel, programs, x, *args, **constants, R=s.rows, J=j, L=lanes, num_warps=s.warps)


def _reduce(self, dim, keepdim, dtype, op, p=0.0, chosen=None):
    x, shape = as_rows(self, dim)
    out = _out(self, dim, keepdim, dtype, shape)
    if x.shape[1] == 0 and op in ("absmax", "absmin"):
        return out.zero_()
    if out.numel():
        launch_rows(reduce_kernel, x, out, *x.shape, *strides(x), float(p), OP=op, chosen=chosen)
    return out


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
        launch_rows(
            var_kernel, x, out, average, *x.shape, *strides(x), float(correction), ROOT=root,
            chosen=chosen,
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
        launch_rows(logsumexp_kernel, x, out, *x.shape, *strides(x), chosen=chosen)
    return out
