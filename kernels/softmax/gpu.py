"""Triton kernels of softmax and log_softmax: exact maximum, the sum in the order of `trees`."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.trees import (
    BLOCK,
    block_max,
    block_sum,
    exp,
    load_terms,
    log,
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
