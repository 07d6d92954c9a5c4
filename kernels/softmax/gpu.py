"""Triton kernels of the softmax family: exact maximum, the sums in the order of `trees`."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.trees import (
    BLOCK,
    block_max,
    block_sum,
    exp,
    fold_rows,
    load_terms,
    log,
    pair_tree,
    positions,
    strides,
)
from bicompile.kernels.reduce.gpu import launch_rows, row_extreme, row_sum, rows_of


@triton.jit
def _result(x, top, total, LOG: tl.constexpr):
    """One element of the output; top, total: [R, 1, 1]."""
    if LOG:
        y = (x - top) - log(total)
    else:
        e = exp(x - top)
        y = tl.div_rn(e, tl.broadcast_to(total, e.shape))
    return y


@triton.jit(do_not_specialize=["M"])
def softmax_kernel(
    X, Y, M, K, sm, sk,
    LOG: tl.constexpr, ONE: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """R rows. ONE: a row is one block and stays in registers."""
    after_others(PDL)
    r, _, row, there = rows_of(M, sm, R)
    at = positions(J, L)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_terms(X, row, there, at, K, sk, float("-inf"))
        top = block_max(x)[:, None, None]
        e = tl.where(at < K, exp(x - top), 0.0)
        total = block_sum(e.to(tl.float64), R, J, L).to(tl.float32)[:, None, None]
        y = _result(x, top, total, LOG)
        tl.store(out + at, y.to(Y.dtype.element_ty), mask=there & (at < K))
    else:
        top = row_extreme(X, row, there, K, sk, "max", R, J, L)[:, None, None]
        total = row_sum(X, row, there, K, sk, top, 0.0, "exp", R, J, L)
        total = total.to(tl.float32)[:, None, None]
        for k0 in range(0, K, J * L):
            k = k0 + at
            x = load_terms(X, row, there, k, K, sk, 0.0)
            y = _result(x, top, total, LOG)
            tl.store(out + k, y.to(Y.dtype.element_ty), mask=there & (k < K))


@triton.jit(do_not_specialize=["M", "N"])
def log_softmax_gather_kernel(
    X, INDEX, Y, M, K, sm, sk, N, im, ik,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of R rows the N elements that INDEX [M, N] names; NaN where it names none."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    top = row_extreme(X, row, there, K, sk, "max", R, J, L)
    total = row_sum(X, row, there, K, sk, top[:, None, None], 0.0, "exp", R, J, L).to(tl.float32)
    shift = log(total)
    for n in range(N):
        k = tl.load(INDEX + r * im + n * ik, mask=here, other=0)
        inside = here & (k >= 0) & (k < K)
        x = tl.load(X + r * sm + k * sk, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(Y + r * N + n, ((x - top) - shift).to(Y.dtype.element_ty), mask=here)


def _softmax(self, dim, dtype, is_log, chosen=None):
    if self.ndim == 0:
        return _softmax(self.reshape(1), 0, dtype, is_log, chosen).reshape(())
    x = self.movedim(dim, -1)
    k = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel():
        rows = x.reshape(-1, k)
        one = k <= BLOCK
        launch_rows(
            softmax_kernel, rows, out, *rows.shape, *strides(rows), LOG=is_log, ONE=one,
            family="softmax", chosen=chosen,
        )  # fmt: skip
    return out.movedim(-1, dim).contiguous()


def softmax(self, dim, dtype, chosen=None):
    """exp(x - max) / sum(exp(x - max)) along dim; contiguous."""
    return _softmax(self, dim, dtype, False, chosen)


def log_softmax(self, dim, dtype, chosen=None):
    """(x - max) - log(sum(exp(x - max))) along dim; contiguous."""
    return _softmax(self, dim, dtype, True, chosen)


def log_softmax_gather(self, dim, index, dtype, chosen=None):
    """The elements of log_softmax along dim that index names; contiguous."""
    x, at = self.movedim(dim, -1), index.movedim(dim, -1)
    if x.shape[:-1] != at.shape[:-1]:
        raise ValueError(f"sizes do not fit: {[*self.shape]} and {[*index.shape]}, along {dim}")
    out = torch.empty(at.shape, dtype=dtype, device=x.device)
    if out.numel():
        rows, at = x.reshape(-1, x.shape[-1]), at.reshape(-1, at.shape[-1])
        launch_rows(
            log_softmax_gather_kernel, rows, at, out, *rows.shape, *strides(rows), at.shape[1],
            *strides(at), family="softmax", chosen=chosen,
        )  # fmt: skip
    return out.movedim(-1, dim).contiguous()


@triton.jit(do_not_specialize=["M"])
def softmax_backward_kernel(
    G, Y, OUT, M, K, gm, gk, ym, yk,
    LOG: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows: the sum, then the elements."""
    after_others(PDL)
    r, _, g_row, there = rows_of(M, gm, R)
    y_row = (r * ym)[:, None, None]
    at = positions(J, L)
    acc = tl.zeros([R, L], tl.float64)
    for k0 in range(0, K, J * L):
        g = load_terms(G, g_row, there, k0 + at, K, gk, 0.0).to(tl.float64)
        if not LOG:
            g = g * load_terms(Y, y_row, there, k0 + at, K, yk, 0.0).to(tl.float64)
        acc += fold_rows(g, R, J, L)
    total = pair_tree(acc, R, L).to(tl.float32)[:, None, None]
    out = OUT + (r * K)[:, None, None]
    for k0 in range(0, K, J * L):
        k = k0 + at
        g = load_terms(G, g_row, there, k, K, gk, 0.0)
        y = load_terms(Y, y_row, there, k, K, yk, 0.0)
        d = g - exp(y) * total if LOG else (g - total) * y
        tl.store(out + k, d.to(OUT.dtype.element_ty), mask=there & (k < K))


def _backward(grad, output, dim, dtype, is_log, chosen):
    if grad.ndim == 0:
        one = (t.reshape(1) for t in (grad, output))
        return _backward(*one, 0, dtype, is_log, chosen).reshape(())
    grad, output = grad.movedim(dim, -1), output.movedim(dim, -1)
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if out.numel():
        g, y = (t.reshape(-1, t.shape[-1]) for t in (grad, output))
        launch_rows(
            softmax_backward_kernel, g, y, out, *g.shape, *strides(g), *strides(y), LOG=is_log,
            family="softmax", chosen=chosen,
        )  # fmt: skip
    return out.movedim(-1, dim).contiguous()


def softmax_backward(grad, output, dim, dtype, chosen=None):
    """(grad - sum(grad * output)) * output along dim; contiguous."""
    return _backward(grad, output, dim, dtype, False, chosen)


def log_softmax_backward(grad, output, dim, dtype, chosen=None):
    """grad - exp(output) * sum(grad) along dim; contiguous."""
    return _backward(grad, output, dim, dtype, True, chosen)
