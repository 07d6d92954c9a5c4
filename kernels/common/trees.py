"""Triton device functions that every family shares: sums with their order in the IR, and math.

`tl.sum` over an axis takes its order from the layout, and the layout follows alignment, strides and
warps. A `tl.sum` over exactly two elements is a + b in every layout, so a sum here is a chain of
those: the order is then part of the program, and the compiler keeps its freedom to schedule.
Sums run in float64, so that a result is rounded once, at its end: in float32, 256 lanes and their
tree have up to 3 times the error of PyTorch's own sums.

Order of a row of K terms (pinned, a function of K alone; see `row_shape`): blocks of J * L terms in
rising order; a block is J rows of L lanes, folded by halves to L lanes; the lanes of successive
blocks are added in rising order; the L lanes are joined by a tree of neighbours.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 4096  # pinned: terms of one block
LANES = 256  # pinned: lanes of one block

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)

#: Launch options of every kernel: a product and a sum are two roundings, never one.
OPTIONS = {"enable_fp_fusion": False}


def row_shape(k: int) -> tuple[int, int]:
    """(J, L) for a row of k terms: part of the order, so it looks at k and at nothing else."""
    block = min(triton.next_power_of_2(max(k, 1)), BLOCK)
    lanes = min(block, LANES)
    return block // lanes, lanes


def strides(x: torch.Tensor) -> list[int]:
    """Strides for a kernel; 0 for an axis of one element: its stride makes no new variant."""
    return [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _pairs(v, AXIS: tl.constexpr, MUL: tl.constexpr):
    """Join an axis of two."""
    if MUL:
        v = tl.reduce(v, AXIS, _product)
    else:
        v = tl.sum(v, AXIS)
    return v


@triton.jit
def pair_tree(v, R: tl.constexpr, W: tl.constexpr, MUL: tl.constexpr = False):
    """[R, W] -> [R]: neighbours are joined, again and again."""
    for i in tl.static_range(12):
        if (W >> (i + 1)) >= 1:
            v = _pairs(tl.reshape(v, [R, W >> (i + 1), 2]), 2, MUL)
    return tl.reshape(v, [R])


@triton.jit
def fold_rows(v, R: tl.constexpr, J: tl.constexpr, W: tl.constexpr, MUL: tl.constexpr = False):
    """[R, J, W] -> [R, W]: the J rows of lanes are folded by halves."""
    for i in tl.static_range(8):
        if (J >> (i + 1)) >= 1:
            v = _pairs(tl.reshape(v, [R, 2, J >> (i + 1), W]), 1, MUL)
    return tl.reshape(v, [R, W])


@triton.jit
def block_sum(v, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr):
    """[R, J, L] -> [R]: the sum of a row that is one block."""
    return pair_tree(fold_rows(v, R, J, L), R, L)


@triton.jit
def block_max(v):
    """[R, J, L] -> [R]: exact, so its order is free."""
    return tl.max(tl.max(v, 1), 1)


@triton.jit
def positions(J: tl.constexpr, L: tl.constexpr):
    """[1, J, L]: the place of each term in its block."""
    return (tl.arange(0, J)[:, None] * L + tl.arange(0, L)[None, :])[None, :, :]


@triton.jit
def load_terms(X, row, here, k, K, stride, other):
    """Terms k of each row as fp32, else `other`. row, here: [R, 1, 1]; k: [1, J, L]."""
    x = tl.load(X + row + k.to(tl.int64) * stride, mask=here & (k < K), other=other)
    return x.to(tl.float32)


@triton.jit
def exp(x):
    """Accurate exponential (libdevice, as Inductor emits)."""
    if INTERPRET:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def log(x):
    """Accurate natural logarithm."""
    if INTERPRET:
        y = tl.log(x)
    else:
        y = libdevice.log(x)
    return y


@triton.jit
def log1p(x):
    """Accurate logarithm of 1 + x."""
    if INTERPRET:
        y = tl.log(1.0 + x)
    else:
        y = libdevice.log1p(x)
    return y


@triton.jit
def rsqrt(x):
    """The reciprocal root that Inductor emits for aten.rsqrt."""
    if INTERPRET:
        y = tl.rsqrt(x)
    else:
        y = libdevice.rsqrt(x)
    return y


@triton.jit
def power(x, p):
    """x ** p for x >= 0."""
    if INTERPRET:
        y = tl.exp2(tl.log2(x) * p)
    else:
        y = libdevice.pow(x, p)
    return y
