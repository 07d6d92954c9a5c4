"""Triton kernels of the norms and their gradients: sums in the order of `trees`."""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from bicompile.kernels.common.blocks import held_sum, load_block, places, store_block
from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.room import empty_with_room
from bicompile.kernels.common.trees import (
    BLOCK,
    INTERPRET,
    fold_rows,
    load_terms,
    pair_tree,
    positions,
    rsqrt,
    strides,
)
from bicompile.kernels.reduce.rows import launch_rows, row_sum, rows_of

AHEAD_OF = tl.constexpr(
    16
)  # terms of a thread that leave it registers for weights before their use


@triton.jit
def _affine(x, mean, rstd, w, b):
    """fma((x - mean) * rstd, w, b) in fp32; a weight may be None."""
    y = (x - mean) * rstd
    if w is not None and b is not None:
        y = tl.fma(y, w, b)
    elif w is not None:
        y = y * w
    elif b is not None:
        y = y + b
    return y


@triton.jit
def _of_channels(W, r, k, here, GROUPS, CHANNELS, SPATIAL, HAS_W: tl.constexpr):
    """The weight of the channel of term k of row r, fp32."""
    w = None
    if HAS_W:
        channel = (r % GROUPS * CHANNELS)[:, None, None] + k // SPATIAL
        w = tl.load(W + channel, mask=here, other=0.0).to(tl.float32)
    return w


@triton.jit
def _block_of_channels(
    W, r, K, GROUPS, CHANNELS, SPATIAL, HAS_W: tl.constexpr, J: tl.constexpr, L: tl.constexpr
):
    """The same of all terms of rows of one block."""
    w = None
    if HAS_W:
        w = load_block(W, (r % GROUPS * CHANNELS)[:, None, None], True, K, 1, 0.0, J, L, SPATIAL)
    return w


@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    X, W, B, Y, MEAN, RSTD, M, K, sm, sk, GROUPS, CHANNELS, SPATIAL, eps,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, ONE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """layer_norm (one group of K channels) and group_norm (rows are sample x group)."""
    after_others(PDL)
    AHEAD: tl.constexpr = INTERPRET or AHEAD_OF * num_threads() >= R * J * L
    r, here, row, there = rows_of(M, sm, R)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_block(X, row, there, K, sk, 0.0, J, L)
        if AHEAD:
            w = _block_of_channels(W, r, K, GROUPS, CHANNELS, SPATIAL, HAS_W, J, L)
            b = _block_of_channels(B, r, K, GROUPS, CHANNELS, SPATIAL, HAS_B, J, L)
        mean = held_sum(x.to(tl.float64), R, J, L) / K
        d = tl.where(places(J, L) < K, x.to(tl.float64) - mean[:, None, None], 0.0)
        var = held_sum(d * d, R, J, L) / K
    else:
        mean = row_sum(X, row, there, K, sk, 0.0, 0.0, "sum", R, J, L) / K
        shift = mean[:, None, None]
        var = row_sum(X, row, there, K, sk, shift, 0.0, "deviation", R, J, L) / K
    mean = mean.to(tl.float32)
    rstd = (1.0 / tl.sqrt(var + eps)).to(tl.float32)
    tl.store(MEAN + r, mean, mask=here)
    tl.store(RSTD + r, rstd, mask=here)
    mean, rstd = mean[:, None, None], rstd[:, None, None]
    if ONE:
        if not AHEAD:
            w = _block_of_channels(W, r, K, GROUPS, CHANNELS, SPATIAL, HAS_W, J, L)
            b = _block_of_channels(B, r, K, GROUPS, CHANNELS, SPATIAL, HAS_B, J, L)
        store_block(out, _affine(x, mean, rstd, w, b), there, K, J, L)
    else:
        for k0 in range(0, K, J * L):
            k = k0 + positions(J, L)
            mask = there & (k < K)
            x = load_terms(X, row, there, k, K, sk, 0.0)
            w = _of_channels(W, r, k, mask, GROUPS, CHANNELS, SPATIAL, HAS_W)
            b = _of_channels(B, r, k, mask, GROUPS, CHANNELS, SPATIAL, HAS_B)
            y = _affine(x, mean, rstd, w, b)
            tl.store(out + k, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def scaled(
    x, r, w, offset, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, TYPE: tl.constexpr
):
    """The roundings of the chain that rms_norm replaces; r: [R, 1, 1]; w: fp32, or None."""
    y = x * r
    if w is not None:
        if HAS_OFFSET:
            w = w + offset
        if ROUND_FIRST:
            y = y.to(TYPE).to(tl.float32)
            w = w.to(TYPE).to(tl.float32)
        y = y * w
    return y.to(TYPE)


@triton.jit
def _weights(W, k, here, K, HAS_W: tl.constexpr):
    """The weights of terms k, fp32."""
    w = None
    if HAS_W:
        w = load_terms(W, 0, here, k, K, 1, 0.0)
    return w


@triton.jit
def _block_of_weights(W, row, here, K, HAS_W: tl.constexpr, J: tl.constexpr, L: tl.constexpr):
    """Those of all terms of rows of one block."""
    w = None
    if HAS_W:
        w = load_block(W, tl.zeros_like(row), here, K, 1, 0.0, J, L)
    return w


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    X, W, Y, M, K, sm, sk, eps, offset,
    HAS_W: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ONE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mean of the rounded squares is bit for bit what bicompile::mean gives."""
    after_others(PDL)
    AHEAD: tl.constexpr = INTERPRET or AHEAD_OF * num_threads() >= R * J * L
    TYPE: tl.constexpr = Y.dtype.element_ty
    r, _, row, there = rows_of(M, sm, R)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_block(X, row, there, K, sk, 0.0, J, L)
        if AHEAD:
            w = _block_of_weights(W, row, there, K, HAS_W, J, L)
        total = held_sum((x * x).to(tl.float64), R, J, L)
    else:
        total = row_sum(X, row, there, K, sk, 0.0, 0.0, "square", R, J, L)
    scale = rsqrt((total / K).to(tl.float32) + eps)[:, None, None]
    if ONE:
        if not AHEAD:
            w = _block_of_weights(W, row, there, K, HAS_W, J, L)
        y = scaled(x, scale, w, offset, HAS_OFFSET, ROUND_FIRST, TYPE)
        store_block(out, y, there, K, J, L)
    else:
        for k0 in range(0, K, J * L):
            k = k0 + positions(J, L)
            x = load_terms(X, row, there, k, K, sk, 0.0)
            w = _weights(W, k, there, K, HAS_W)
            y = scaled(x, scale, w, offset, HAS_OFFSET, ROUND_FIRST, TYPE)
            tl.store(out + k, y, mask=there & (k < K))


def _rows(x: torch.Tensor, m: int) -> torch.Tensor:
    """x as [M, K], the terms of a row side by side.

    Where they stand apart, LLVM packs offsets of two layouts into one register, and what overflows
    in the lower half changes the upper one (Triton 3.6, rows of 16 terms).
    """
    x = x.reshape(m, x.numel() // max(m, 1))
    return x if x.shape[1] < 2 or x.stride(1) < 2 else x.contiguous()


def _split(input: torch.Tensor, nd: int) -> tuple[torch.Tensor, list[int]]:
    """The input as [M, K], and the shape of its statistics."""
    lead = list(input.shape[: input.ndim - nd])
    return _rows(input, math.prod(lead)), lead + [1] * nd


def _flat(x: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A weight as a dense vector; an absent one is never read."""
    return stand_in if x is None else x.contiguous()


def _result(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Memory for a result like x [M, K]; a product often follows."""
    return empty_with_room(*x.shape, dtype=x.dtype, device=x.device).view(shape)


def _normalise(x, weight, bias, out, stats, groups, channels, spatial, eps, chosen):
    mean, rstd = (torch.empty(stats, dtype=torch.float32, device=x.device) for _ in range(2))
    if mean.numel():
        launch_rows(
            layer_norm_kernel, x, _flat(weight, x), _flat(bias, x), out, mean, rstd,
            *x.shape, *strides(x), groups, channels, spatial, float(eps),
            HAS_W=weight is not None, HAS_B=bias is not None, ONE=x.shape[1] <= BLOCK,
            family="norm", crowded=True, held=True, chosen=chosen,
        )  # fmt: skip
    return out, mean, rstd


def layer_norm(input, normalized_ndim, weight, bias, eps, chosen=None):
    """(x - mean) * rstd * weight + bias over the last axes; out, mean and rstd (fp32)."""
    x, stats = _split(input, normalized_ndim)
    out = _result(x, input.shape)
    return _normalise(x, weight, bias, out, stats, 1, x.shape[1], 1, eps, chosen)


def group_norm(input, weight, bias, groups, eps, chosen=None):
    """Normalisation over each group of channels of a sample; out, mean and rstd (fp32)."""
    n, c = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    x = _rows(input, n * groups)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    size = c // groups
    return _normalise(x, weight, bias, out, [n, groups], groups, size, max(spatial, 1), eps, chosen)


def rms_norm(input, normalized_ndim, weight, eps, offset, round_first, chosen=None):
    """x * rsqrt(mean(x * x) + eps), times offset + weight."""
    x, _ = _split(input, normalized_ndim)
    out = _result(x, input.shape)
    if out.numel():
        launch_rows(
            rms_norm_kernel, x, _flat(weight, x), out, *x.shape, *strides(x), float(eps),
            float(offset), HAS_W=weight is not None, HAS_OFFSET=offset != 0,
            ROUND_FIRST=bool(round_first), ONE=x.shape[1] <= BLOCK, family="norm", held=True,
            chosen=chosen,
        )  # fmt: skip
    return out


@triton.jit
def _graded(
    G, X, W, g_row, x_row, there, r, k, K, gk, xk, mean, rstd, GROUPS, CHANNELS, SPATIAL,
    HAS_W: tl.constexpr,
):  # fmt: skip
    """grad * weight and the normalised input, fp64."""
    g = load_terms(G, g_row, there, k, K, gk, 0.0).to(tl.float64)
    x = load_terms(X, x_row, there, k, K, xk, 0.0).to(tl.float64)
    if HAS_W:
        channel = (r % GROUPS * CHANNELS)[:, None, None] + k // SPATIAL
        g = g * tl.load(W + channel, mask=there & (k < K), other=0.0).to(tl.float64)
    return g, tl.where(there & (k < K), (x - mean) * rstd, 0.0)


@triton.jit(do_not_specialize=["M"])
def norm_backward_kernel(
    G, X, MEAN, RSTD, W, OUT, M, K, gm, gk, xm, xk, GROUPS, CHANNELS, SPATIAL,
    HAS_W: tl.constexpr, CENTRED: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """rstd * ((g - mean(g)) - y * mean(g * y)), g: grad * weight, y: the normalised input."""
    after_others(PDL)
    r, here, g_row, there = rows_of(M, gm, R)
    x_row = (r * xm)[:, None, None]
    at = positions(J, L)
    rstd = tl.load(RSTD + r, mask=here, other=0.0).to(tl.float64)[:, None, None]
    mean = tl.zeros([R, 1, 1], tl.float64)
    if CENTRED:
        mean = tl.load(MEAN + r, mask=here, other=0.0).to(tl.float64)[:, None, None]
    sum_g, sum_gy = tl.zeros([R, L], tl.float64), tl.zeros([R, L], tl.float64)
    for k0 in range(0, K, J * L):
        g, y = _graded(
            G, X, W, g_row, x_row, there, r, k0 + at, K, gk, xk, mean, rstd,
            GROUPS, CHANNELS, SPATIAL, HAS_W,
        )  # fmt: skip
        if CENTRED:
            sum_g += fold_rows(g, R, J, L)
        sum_gy += fold_rows(g * y, R, J, L)
    shift = (pair_tree(sum_g, R, L) / K)[:, None, None]
    slope = (pair_tree(sum_gy, R, L) / K)[:, None, None]
    out = OUT + (r * K)[:, None, None]
    for k0 in range(0, K, J * L):
        k = k0 + at
        g, y = _graded(
            G, X, W, g_row, x_row, there, r, k, K, gk, xk, mean, rstd,
            GROUPS, CHANNELS, SPATIAL, HAS_W,
        )  # fmt: skip
        d = ((g - shift) - y * slope) * rstd
        tl.store(out + k, d.to(tl.float32).to(OUT.dtype.element_ty), mask=there & (k < K))


def _input_gradient(grad, input, mean, rstd, weight, rows, groups, channels, spatial, chosen):
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if out.numel():
        g, x = _rows(grad, rows), _rows(input, rows)
        launch_rows(
            norm_backward_kernel, g, x, _flat(mean, x), _flat(rstd, x), _flat(weight, x), out,
            *g.shape, *strides(g), *strides(x), groups, channels, spatial,
            HAS_W=weight is not None, CENTRED=mean is not None, family="norm", crowded=True,
            chosen=chosen,
        )  # fmt: skip
    return out


def layer_norm_backward(grad, input, normalized_ndim, mean, rstd, weight, chosen=None):
    """The gradient of layer_norm with respect to its input; of rms_norm without a mean."""
    x, _ = _split(input, normalized_ndim)
    return _input_gradient(grad, input, mean, rstd, weight, x.shape[0], 1, x.shape[1], 1, chosen)


def group_norm_backward(grad, input, mean, rstd, weight, groups, chosen=None):
    """The gradient of group_norm with respect to its input."""
    n, c = input.shape[:2]
    spatial = max(math.prod(input.shape[2:]), 1)
    size = c // groups
    return _input_gradient(
        grad, input, mean, rstd, weight, n * groups, groups, size, spatial, chosen
    )
