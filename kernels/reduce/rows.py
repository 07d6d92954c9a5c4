"""Whole rows on a GPU: their sums and extremes in the order of `trees`, any rows per program."""

import math

import torch
import triton
import triton.language as tl

from bicompile.certificate import choose
from bicompile.kernels.common.launch import launch
from bicompile.kernels.common.trees import (
    block_max,
    exp,
    load_terms,
    pair_tree,
    positions,
    power,
    row_shape,
)
from bicompile.kernels.reduce.schedules import SINGLE
from bicompile.kernels.reduce.table import entry, wanted


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


def as_rows(x: torch.Tensor, dim: list[int]) -> tuple[torch.Tensor, list[int]]:
    """x as [M, K] with the reduced axes last, and the shape of the kept axes."""
    kept = [d for d in range(x.ndim) if d not in dim]
    shape = [x.shape[d] for d in kept]
    k = math.prod(x.shape[d] for d in dim)
    x = x.permute(kept + list(dim)).reshape(math.prod(shape), k)
    return (x if k < 2 or x.stride(1) < 2 else x.contiguous()), shape


def row_schedule(x, family="reduce", crowded=False, held=False, cut=True):
    """The table's schedule of a family's kernel for x [M, K] (see `table.wanted`)."""
    m, k = x.shape
    e = entry(k, math.prod(row_shape(k)))
    best = wanted(family, m, k, e, crowded, held, cut)
    return choose(family, e.name, best, SINGLE[e.name], lambda: e.schedules(cut))


def launch_rows(
    kernel, x, *args, family="reduce", crowded=False, held=False, chosen=None, **constants
):
    """Run a row kernel of a family over x [M, K] on the chosen schedule, or one of whole rows."""
    m, k = x.shape
    j, lanes = row_shape(k)
    s = chosen or row_schedule(x, family, crowded, held, cut=False)
    programs = triton.cdiv(m, s.rows)
    launch(kernel, programs, x, *args, **constants, R=s.rows, J=j, L=lanes, num_warps=s.warps)
