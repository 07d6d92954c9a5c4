"""Long rows that are cut into parts of some blocks each, for as many programs.

What a block adds to a row are its lanes, which depend on no other block: the programs of the parts
write them down (`lanes`), and one that needs the sum of the row adds them in the pinned order
(`joined`). A maximum is exact in any order, so each part has its own (`extremes`).
"""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import BLOCK, LANES, pair_tree, strides
from bicompile.kernels.reduce.rows import block_lanes, row_extreme

CHAIN = 64  # more blocks of a row, or ..
READ = 16384  # .. that all programs which need the sum read together, are joined in stages
NODES = 16  # programs that the first stage has for a row


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
    """[R] fp32: the maximum of rows r from those of their parts; FINITE: as a `finite_shift`."""
    row = (r * parts)[:, None, None]
    top = row_extreme(TOPS, row, here[:, None, None], 0, parts, 1, "max", R, 1, 64)
    return finite_shift(top) if FINITE else top


@triton.jit
def finite_shift(top):
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


def lanes(x, s, op, p=0.0, shift=None, finite=False, times=None, readers=1):
    """[M, n, W] fp64: the lanes of all blocks of the rows, or nodes that lanes are joined to.

    readers: programs that need the sum of a row.
    """
    m, k = x.shape
    blocks = triton.cdiv(k, BLOCK)
    out = torch.empty(m, blocks, LANES, dtype=torch.float64, device=x.device)
    launch_parts(
        lanes_kernel, s, x, times, shift, out, k, *strides(x),
        *((0, 0) if times is None else strides(times)), s.blocks, s.parts(k), p,
        OP=op, FINITE=finite,
    )  # fmt: skip
    if blocks <= CHAIN and readers * m * blocks <= READ:
        return out
    nodes = torch.empty(m, 1, NODES, dtype=torch.float64, device=x.device)
    mul = op == "prod"
    launch(join_kernel, m * NODES, out, nodes, blocks, MUL=mul, L=LANES, P=NODES, num_warps=1)
    return nodes


def blocks_of(sums: torch.Tensor | None) -> tuple[int, int]:
    """(n, W) of what `lanes` returns; of rows that are whole there is nothing."""
    return (0, 1) if sums is None else tuple(sums.shape[1:])


def exp_parts(x, s, finite=False, readers=1):
    """Of rows in parts the maxima of the parts, and the lanes of the sum of exponentials."""
    if not s.blocks:
        return None, None
    tops = extremes(x, s)
    return tops, lanes(x, s, "exp", shift=tops, finite=finite, readers=readers)
