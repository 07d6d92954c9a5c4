"""Triton kernels of the softmax family: exact maximum, the sums in the order of `trees`."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.blocks import held_max, held_sum, load_block, store_block
from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.trees import (
    BLOCK,
    exp,
    load_terms,
    log,
    positions,
    strides,
)
from bicompile.kernels.reduce.parts import (
    blocks_of,
    exp_parts,
    joined,
    lanes,
    launch_parts,
    part_of,
    top_of,
)
from bicompile.kernels.reduce.rows import (
    as_rows,
    launch_rows,
    row_extreme,
    row_schedule,
    row_sum,
    row_sum_times,
    rows_of,
)


@triton.jit
def _shares(
    X, out, row, there, start, end, K, sk, top, total,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """exp(x - top) / total of the terms from start to end."""
    at = positions(J, L)
    for k0 in range(start, end, J * L):
        k = k0 + at
        x = load_terms(X, row, there, k, K, sk, 0.0)
        e = exp(x - top)
        y = tl.div_rn(e, tl.broadcast_to(total, e.shape))
        tl.store(out + k, y.to(out.dtype.element_ty), mask=there & (k < K))


@triton.jit(do_not_specialize=["M"])
def softmax_kernel(
    X, Y, M, K, sm, sk,
    ONE: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows. ONE: a row is one block and stays in registers."""
    after_others(PDL)
    r, _, row, there = rows_of(M, sm, R)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_block(X, row, there, K, sk, float("-inf"), J, L)
        e = exp(x - held_max(x)[:, None, None])
        total = held_sum(e.to(tl.float64), R, J, L).to(tl.float32)[:, None, None]
        store_block(out, tl.div_rn(e, tl.broadcast_to(total, e.shape)), there, K, J, L)
    else:
        top = row_extreme(X, row, there, 0, K, sk, "max", R, J, L)[:, None, None]
        total = row_sum(X, row, there, K, sk, top, 0.0, "exp", R, J, L)
        total = total.to(tl.float32)[:, None, None]
        _shares(X, out, row, there, 0, K, K, sk, top, total, R, J, L)


@triton.jit(do_not_specialize=["blocks", "parts"])
def softmax_part_kernel(
    X, TOPS, SUMS, Y, K, parts, n, W: tl.constexpr, sm, sk, blocks,
    J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a row."""
    after_others(PDL)
    r, row, start, end = part_of(sm, K, blocks, J, L)
    rows, here = r + tl.arange(0, 1), tl.full([1], True, tl.int1)
    top = top_of(TOPS, rows, here, parts, 1)[:, None, None]
    total = joined(SUMS, rows, here, n, 1, W).to(tl.float32)[:, None, None]
    _shares(X, Y + r * K, row, True, start, end, K, sk, top, total, 1, J, L)


@triton.jit(do_not_specialize=["M", "parts"])
def statistics_kernel(
    X, TOPS, SUMS, TOP, SHIFT, M, K, parts, n, W: tl.constexpr, sm, sk,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of R rows the maximum, and the logarithm of the sum. TOPS, SUMS: if rows are in parts."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    if SUMS is None:
        top = row_extreme(X, row, there, 0, K, sk, "max", R, J, L)
        total = row_sum(X, row, there, K, sk, top[:, None, None], 0.0, "exp", R, J, L)
    else:
        top = top_of(TOPS, r, here, parts, R)
        total = joined(SUMS, r, here, n, R, W)
    tl.store(TOP + r, top, mask=here)
    tl.store(SHIFT + r, log(total.to(tl.float32)), mask=here)


def softmax(self, dim, dtype, chosen=None):
    """exp(x - max) / sum(exp(x - max)) along dim; contiguous."""
    if self.ndim == 0:
        return softmax(self.reshape(1), 0, dtype, chosen).reshape(())
    x = self.movedim(dim, -1)
    k = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        rows = x.reshape(-1, k)
        s = chosen or row_schedule(rows, "softmax", held=True)
        if s.blocks:
            tops, sums = exp_parts(rows, s, readers=s.parts(k))
            launch_parts(
                softmax_part_kernel, s, rows, tops, sums, out, k, s.parts(k), *blocks_of(sums),
                *strides(rows), s.blocks,
            )  # fmt: skip
        else:
            one = k <= BLOCK
            launch_rows(
                softmax_kernel, rows, out, *rows.shape, *strides(rows), ONE=one, chosen=s
            )  # fmt: skip
    return out.movedim(-1, dim).contiguous()


def softmax_statistics(self, dim, chosen=None):
    """The maximum along dim and log(sum(exp(x - max))), float32, dim kept; contiguous."""
    if self.ndim == 0:
        top, shift = softmax_statistics(self.reshape(1), 0, chosen)
        return top.reshape(()), shift.reshape(())
    rows, kept = as_rows(self, [dim % self.ndim])
    kept.insert(dim % self.ndim, 1)
    out = [torch.empty(kept, dtype=torch.float32, device=self.device) for _ in range(2)]
    if out[0].numel():
        s = chosen or row_schedule(rows, "softmax")
        tops, sums = exp_parts(rows, s)
        launch_rows(
            statistics_kernel, rows, tops, sums, *out, *rows.shape, s.parts(rows.shape[1]),
            *blocks_of(sums), *strides(rows), chosen=s,
        )  # fmt: skip
    return tuple(out)


@triton.jit
def _graded(
    G, Y, out, g_row, y_row, there, start, end, K, gk, yk, total,
    J: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(g - total) * y of the terms from start to end."""
    at = positions(J, L)
    for k0 in range(start, end, J * L):
        k = k0 + at
        g = load_terms(G, g_row, there, k, K, gk, 0.0)
        y = load_terms(Y, y_row, there, k, K, yk, 0.0)
        tl.store(out + k, ((g - total) * y).to(out.dtype.element_ty), mask=there & (k < K))


@triton.jit(do_not_specialize=["M"])
def softmax_backward_kernel(
    G, Y, OUT, M, K, gm, gk, ym, yk,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows: the sum, then the elements."""
    after_others(PDL)
    r, _, g_row, there = rows_of(M, gm, R)
    y_row = (r * ym)[:, None, None]
    total = row_sum_times(G, Y, g_row, y_row, there, K, gk, yk, 0.0, 0.0, "sum", R, J, L)
    total = total.to(tl.float32)[:, None, None]
    out = OUT + (r * K)[:, None, None]
    _graded(G, Y, out, g_row, y_row, there, 0, K, K, gk, yk, total, J, L)


@triton.jit(do_not_specialize=["blocks"])
def softmax_backward_part_kernel(
    G, Y, SUMS, OUT, K, n, W: tl.constexpr, gm, gk, ym, yk, blocks,
    J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a row."""
    after_others(PDL)
    r, g_row, start, end = part_of(gm, K, blocks, J, L)
    rows, here = r + tl.arange(0, 1), tl.full([1], True, tl.int1)
    total = joined(SUMS, rows, here, n, 1, W).to(tl.float32)[:, None, None]
    _graded(G, Y, OUT + r * K, g_row, r * ym, True, start, end, K, gk, yk, total, J, L)


def softmax_backward(grad, output, dim, dtype, chosen=None):
    """(grad - sum(grad * output)) * output along dim; contiguous."""
    if grad.ndim == 0:
        one = (t.reshape(1) for t in (grad, output))
        return softmax_backward(*one, 0, dtype, chosen).reshape(())
    grad, output = grad.movedim(dim, -1), output.movedim(dim, -1)
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if out.numel():
        g, y = (t.reshape(-1, t.shape[-1]) for t in (grad, output))
        s = chosen or row_schedule(g, "softmax")
        if s.blocks:
            sums = lanes(g, s, "sum", times=y, readers=s.parts(g.shape[1]))
            launch_parts(
                softmax_backward_part_kernel, s, g, y, sums, out, g.shape[1], *blocks_of(sums),
                *strides(g), *strides(y), s.blocks,
            )  # fmt: skip
        else:
            launch_rows(
                softmax_backward_kernel, g, y, out, *g.shape, *strides(g), *strides(y), chosen=s
            )  # fmt: skip
    return out.movedim(-1, dim).contiguous()
