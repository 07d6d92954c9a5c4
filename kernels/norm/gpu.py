"""Triton kernels of layer_norm, rms_norm and group_norm: sums in the order of `trees`."""

import math

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others
from bicompile.kernels.common.trees import (
    BLOCK,
    block_sum,
    load_terms,
    positions,
    rsqrt,
    strides,
)
from bicompile.kernels.reduce.gpu import launch_rows, row_sum, rows_of


@triton.jit
def _affine(
    x, mean, rstd, W, B, r, k, here, GROUPS, CHANNELS, SPATIAL,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """fma((x - mean) * rstd, w, b) in fp32; the channel of term k of row r has the weight."""
    y = (x - mean) * rstd
    channel = (r % GROUPS * CHANNELS)[:, None, None] + k // SPATIAL
    if HAS_W:
        w = tl.load(W + channel, mask=here, other=0.0).to(tl.float32)
    if HAS_B:
        b = tl.load(B + channel, mask=here, other=0.0).to(tl.float32)
    if HAS_W and HAS_B:
        y = tl.fma(y, w, b)
    elif HAS_W:
        y = y * w
    elif HAS_B:
        y = y + b
    return y


@triton.jit(do_not_specialize=["M"])
def layer_norm_kernel(
    X, W, B, Y, MEAN, RSTD, M, K, sm, sk, GROUPS, CHANNELS, SPATIAL, eps,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, ONE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """layer_norm (one group of K channels) and group_norm (rows are sample x group)."""
    after_others(PDL)
    r, here, row, there = rows_of(M, sm, R)
    at = positions(J, L)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_terms(X, row, there, at, K, sk, 0.0)
        mean = block_sum(x.to(tl.float64), R, J, L) / K
        d = tl.where(at < K, x.to(tl.float64) - mean[:, None, None], 0.0)
        var = block_sum(d * d, R, J, L) / K
    else:
        mean = row_sum(X, row, there, K, sk, 0.0, 0.0, "sum", R, J, L) / K
        shift = mean[:, None, None]
        var = row_sum(X, row, there, K, sk, shift, 0.0, "deviation", R, J, L) / K
    mean = mean.to(tl.float32)
    rstd = (1.0 / tl.sqrt(var + eps)).to(tl.float32)
    tl.store(MEAN + r, mean, mask=here)
    tl.store(RSTD + r, rstd, mask=here)
    for k0 in range(0, K, J * L):
        k = k0 + at
        mask = there & (k < K)
        if not ONE:
            x = load_terms(X, row, there, k, K, sk, 0.0)
        y = _affine(
            x, mean[:, None, None], rstd[:, None, None], W, B, r, k, mask,
            GROUPS, CHANNELS, SPATIAL, HAS_W, HAS_B,
        )  # fmt: skip
        tl.store(out + k, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def scaled(
    x, r, W, k, mask, offset,
    HAS_W: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The roundings of the chain that rms_norm replaces; r: [R, 1, 1]."""
    y = x * r
    if HAS_W:
        w = tl.load(W + k, mask=mask, other=0.0).to(tl.float32)
        if HAS_OFFSET:
            w = w + offset
        if ROUND_FIRST:
            y = y.to(TYPE).to(tl.float32)
            w = w.to(TYPE).to(tl.float32)
        y = y * w
    return y.to(TYPE)


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    X, W, Y, M, K, sm, sk, eps, offset,
    HAS_W: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ONE: tl.constexpr,
    R: tl.constexpr, J: tl.constexpr, L: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mean of the rounded squares is bit for bit what bicompile::mean gives."""
    after_others(PDL)
    r, _, row, there = rows_of(M, sm, R)
    at = positions(J, L)
    out = Y + (r * K)[:, None, None]
    if ONE:
        x = load_terms(X, row, there, at, K, sk, 0.0)
        total = block_sum((x * x).to(tl.float64), R, J, L)
    else:
        total = row_sum(X, row, there, K, sk, 0.0, 0.0, "square", R, J, L)
    scale = rsqrt((total / K).to(tl.float32) + eps)[:, None, None]
    for k0 in range(0, K, J * L):
        k = k0 + at
        mask = there & (k < K)
        if not ONE:
            x = load_terms(X, row, there, k, K, sk, 0.0)
        y = scaled(x, scale, W, k, mask, offset, HAS_W, HAS_OFFSET, ROUND_FIRST, Y.dtype.element_ty)
        tl.store(out + k, y, mask=mask)


def _split(input: torch.Tensor, nd: int) -> tuple[torch.Tensor, list[int]]:
    """The input as [M, K], and the shape of its statistics."""
    lead = list(input.shape[: input.ndim - nd])
    k = math.prod(input.shape[input.ndim - nd :])
    return input.reshape(math.prod(lead), k), lead + [1] * nd


def _flat(x: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A weight as a dense vector; an absent one is never read."""
    return stand_in if x is None else x.contiguous()


def _normalise(x, weight, bias, out, stats, groups, channels, spatial, eps, chosen):
    mean, rstd = (torch.empty(stats, dtype=torch.float32, device=x.device) for _ in range(2))
    if mean.numel():
        launch_rows(
            layer_norm_kernel, x, _flat(weight, x), _flat(bias, x), out, mean, rstd,
            *x.shape, *strides(x), groups, channels, spatial, float(eps),
            HAS_W=weight is not None, HAS_B=bias is not None, ONE=x.shape[1] <= BLOCK,
            family="norm", chosen=chosen,
        )  # fmt: skip
    return out, mean, rstd


def layer_norm(input, normalized_ndim, weight, bias, eps, chosen=None):
    """(x - mean) * rstd * weight + bias over the last axes; out, mean and rstd (fp32)."""
    x, stats = _split(input, normalized_ndim)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return _normalise(x, weight, bias, out, stats, 1, x.shape[1], 1, eps, chosen)


def group_norm(input, weight, bias, groups, eps, chosen=None):
    """Normalisation over each group of channels of a sample; out, mean and rstd (fp32)."""
    n, c = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    x = input.reshape(n * groups, c // groups * spatial)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    size = c // groups
    return _normalise(x, weight, bias, out, [n, groups], groups, size, max(spatial, 1), eps, chosen)


def rms_norm(input, normalized_ndim, weight, eps, offset, round_first, chosen=None):
    """x * rsqrt(mean(x * x) + eps), times offset + weight."""
    x, _ = _split(input, normalized_ndim)
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if out.numel():
        launch_rows(
            rms_norm_kernel, x, _flat(weight, x), out, *x.shape, *strides(x), float(eps),
            float(offset), HAS_W=weight is not None, HAS_OFFSET=offset != 0,
            ROUND_FIRST=bool(round_first), ONE=x.shape[1] <= BLOCK, family="norm", chosen=chosen,
        )  # fmt: skip
    return out
