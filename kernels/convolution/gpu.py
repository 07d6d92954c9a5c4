"""Triton convolution: a product whose left side is gathered from the image, or one fma chain.

With more than FEW terms an output is the chain of `tl.dot` of kernels/matmul over k = c * W + w.
With FEW or less, as in a depthwise convolution, it is one fma chain in fp32 over rising k: which of
the two it is follows from the number of terms alone.
"""

import itertools
import math

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides
from bicompile.kernels.convolution.op import output_sizes
from bicompile.kernels.matmul.tiles import _add_dot as add_dot
from bicompile.kernels.matmul.tiles import tile_of

FEW = 64  # pinned: up to so many terms are one fma chain
PART = 32  # pinned: terms of one chain of an "ieee" product, as in kernels/matmul


@triton.jit
def _taps(k, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr):
    """Term k -> its channel and its tap along each axis."""
    return k // (W1 * W2 * W3), k // (W2 * W3) % W1, k // W3 % W2, k % W3


@triton.jit
def _rows(m, P1, P2, P3):
    """Row m -> its image and its position along each axis."""
    return m // (P1 * P2 * P3), m // (P2 * P3) % P1, m // P3 % P2, m % P3


@triton.jit
def _image(
    X, b, p1, p2, p3, c, w1, w2, w3, here, I1, I2, I3, A1, A2, A3, S1, S2, S3, D1, D2, D3,
    sxb, sxc, sx1, sx2, sx3,
):  # fmt: skip
    """Elements of the image that positions p meet by taps w: 0 outside of it."""
    i1 = p1 * S1 + w1 * D1 + A1
    i2 = p2 * S2 + w2 * D2 + A2
    i3 = p3 * S3 + w3 * D3 + A3
    inside = (i1 >= 0) & (i1 < I1) & (i2 >= 0) & (i2 < I2) & (i3 >= 0) & (i3 < I3)
    at = b * sxb + c * sxc + i1 * sx1 + i2 * sx2 + i3 * sx3
    return tl.load(X + at, mask=here & inside, other=0.0)


@triton.jit(do_not_specialize=["M", "P1", "P2", "P3", "I1", "I2", "I3"])
def convolution_kernel(
    X, W, BIAS, Y, M, N, C, P1, P2, P3, I1, I2, I3, A1, A2, A3, S1, S2, S3, D1, D2, D3,
    sxb, sxg, sxc, sx1, sx2, sx3, swg, swn, swc, sw1, sw2, sw3, syb, syg, syn, sy1, sy2, sy3,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BM positions and BN channels of a group; KIND "few" is the fma chain."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    g = (pid // (num_m * num_n)).to(tl.int64)
    tile_m, tile_n = tile_of(pid % (num_m * num_n), num_m, num_n)
    m = (tile_m.to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)[None, :]
    b, p1, p2, p3 = _rows(m, P1, P2, P3)
    image = X + g * sxg
    weight = W + g * swg + n * swn
    acc = tl.zeros([BM, BN], tl.float32)
    K = C * (W1 * W2 * W3)
    for k in tl.range(0, K, BK):
        across = (k + tl.arange(0, BK)).to(tl.int64)
        c, w1, w2, w3 = _taps(across[None, :], W1, W2, W3)
        x = _image(
            image, b, p1, p2, p3, c, w1, w2, w3, (m < M) & (across[None, :] < K), I1, I2, I3,
            A1, A2, A3, S1, S2, S3, D1, D2, D3, sxb, sxc, sx1, sx2, sx3,
        )  # fmt: skip
        c, w1, w2, w3 = _taps(across[:, None], W1, W2, W3)
        at = c * swc + w1 * sw1 + w2 * sw2 + w3 * sw3
        y = tl.load(weight + at, mask=(n < N) & (across[:, None] < K), other=0.0)
        if KIND == "few":
            x = tl.broadcast_to(x.to(tl.float32), [BM, BN])
            acc = tl.math.fma(x, tl.broadcast_to(y.to(tl.float32), [BM, BN]), acc)
        else:
            acc = add_dot(x, y, acc, KIND)
    if HAS_BIAS:
        acc += tl.load(BIAS + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    out = Y + g * syg + b * syb + n * syn + p1 * sy1 + p2 * sy2 + p3 * sy3
    tl.store(out, acc.to(Y.dtype.element_ty), mask=(m < M) & (n < N))


#: kind -> BM, BN, BK, warps, stages: one for each, so that there is nothing to certify.
SCHEDULES = {
    "half": (128, 64, 64, 4, 3),
    "tf32": (64, 64, 32, 4, 3),
    "ieee": (64, 32, PART, 4, 3),
}


def _schedule(dtype: torch.dtype, tf32: bool, terms: int, columns: int):
    if terms <= FEW:
        wide = min(triton.next_power_of_2(columns), 16)
        return "few", (512 // wide, wide, 1, 4, 3)
    kind = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return kind, SCHEDULES[kind]


def _phase(size, taps, stride, padding, dilation, transposed, r):
    """Along one axis: which taps and outputs, then start, step and step of taps in the image.

    Outputs r, r + stride, ... of a transposed convolution meet the same taps.
    """
    if not transposed:
        return slice(None), slice(None), -padding, stride, dilation
    step = stride // math.gcd(stride, dilation)
    first = next((w for w in range(taps) if (r + padding - w * dilation) % stride == 0), taps)
    start = (r + padding - first * dilation) // stride
    return slice(first, None, step), slice(r, None, stride), start, 1, -(step * dilation // stride)


def _on_three_axes(x):
    """[A, B, ...] with axes of one element, so that there are three behind the first two."""
    return x[(slice(None), slice(None), *[None] * (5 - x.dim()))]


def convolution(
    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, tf32
):
    """input [B, G * C, ...], weight [G * N, C, ...], or [G * C, N, ...] if transposed."""
    sizes = output_sizes(input, weight, stride, padding, dilation, transposed, output_padding)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    out = torch.empty((input.shape[0], channels, *sizes), dtype=input.dtype, device=input.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    axes = list(zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True))
    for r in itertools.product(*(range(s if transposed else 1) for s in stride)):
        found = [_phase(*axis, transposed, i) for axis, i in zip(axes, r, strict=True)]
        taps, places, *numbers = zip(*found, strict=True)
        every = (slice(None), slice(None))
        y = out[(*every, *places)]
        if y.numel():
            _launch(input, weight[(*every, *taps)], bias, y, numbers, transposed, groups, tf32)
    return out


def _launch(input, weight, bias, out, numbers, transposed, groups, tf32):
    """One phase; `numbers`: start, step and step of taps along each axis."""
    x, w, y = (_on_three_axes(t) for t in (input, weight, out))
    (batch, channels, *positions), c = y.shape, x.shape[1] // groups
    n, taps = channels // groups, w.shape[2:]
    starts, steps, tap_steps = (
        [*[default] * (3 - len(given)), *given]
        for given, default in zip(numbers, (0, 1, 1), strict=True)
    )
    sx, sw, sy = strides(x), strides(w), strides(y)
    (swc, swn), in_group = (sw[:2], c) if transposed else ((sw[1], sw[0]), n)
    kind, (bm, bn, bk, warps, stages) = _schedule(x.dtype, tf32, c * math.prod(taps), n)
    m = batch * math.prod(positions)
    launch(
        convolution_kernel, groups * triton.cdiv(m, bm) * triton.cdiv(n, bn),
        x, w, out if bias is None else bias, y, m, n, c, *positions, *x.shape[2:], *starts, *steps,
        *tap_steps, sx[0], c * sx[1], *sx[1:], in_group * sw[0], swn, swc, *sw[2:],
        sy[0], n * sy[1], *sy[1:], W1=taps[0], W2=taps[1], W3=taps[2], KIND=kind,
        HAS_BIAS=bias is not None, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
