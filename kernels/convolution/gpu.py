"""Triton convolution: a product whose left side is gathered from the image, or one fma chain.

The image is read with its channels side by side, and so is the weight; where they lie otherwise,
they are copied first, with the channels of a pixel filled up by zeros to a number that loads well.
So k = w * C + c: a step in K is a run of channels of one tap, and few channels are many taps.

An output is the chain of `tl.dot` of kernels/matmul over k; with more than one tap and many terms
there are parts, each a chain from +0, which are added in rising order. One program has all parts,
or each has its own. One channel with up to FEW taps, as in a depthwise convolution, is one fma
chain in fp32 over the taps. Which it is follows from the numbers of channels and taps alone.
"""

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, capability, launch
from bicompile.kernels.common.trees import strides
from bicompile.kernels.convolution.op import output_sizes
from bicompile.kernels.convolution.schedules import schedule
from bicompile.kernels.convolution.tiles import chain, places, put, within
from bicompile.kernels.matmul.schedules import PART as IEEE
from bicompile.kernels.matmul.schedules import kind_of
from bicompile.kernels.matmul.tiles import tile_of

FEW = 64  # pinned: up to so many taps of one channel are one fma chain
PART = 1536  # pinned: terms of one part of a sum, at most
EVEN = 128  # pinned: parts start at multiples of it


@triton.jit(do_not_specialize=["sxr"])
def channels_last_kernel(
    X, Y, R, C, P, P1, P2, P3, sxr, sxs, sxc, sx1, sx2, sx3,
    FULL_C: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """X [.., R, C, P1, P2, P3] -> dense Y [.., R, P, FULL_C], zeros behind C; P = P1 * P2 * P3.

    FLAT: the three axes are as good as one of stride sx3. RUN: see `_run`.
    """
    after_others(PDL)
    tiles_c = tl.cdiv(FULL_C, BC)
    tiles_p = tl.cdiv(P, BP)
    pid = tl.program_id(0)
    row = pid // (tiles_c * tiles_p)
    p = pid // tiles_c % tiles_p * BP + tl.arange(0, BP)
    c = pid % tiles_c * BC + tl.arange(0, BC)
    if FLAT:
        at = p.to(tl.int64) * sx3
    else:
        at = (p // (P2 * P3)).to(tl.int64) * sx1
        at += (p // P3 % P2).to(tl.int64) * sx2 + (p % P3).to(tl.int64) * sx3
    at = c.to(tl.int64)[:, None] * sxc + at[None, :]
    at += (row // R).to(tl.int64) * sxr + (row % R).to(tl.int64) * sxs
    at = tl.max_contiguous(tl.multiple_of(at, [1, RUN]), [1, RUN])
    here = tl.max_constancy((c < C)[:, None] & (p < P)[None, :], [1, RUN])
    tile = tl.load(X + at, mask=here, other=0.0)
    y = Y + row.to(tl.int64) * P * FULL_C + p.to(tl.int64)[:, None] * FULL_C + c[None, :]
    tl.store(y, tl.trans(tile), mask=(p < P)[:, None] & (c < FULL_C)[None, :])


SIZES = ["M", "P1", "P2", "P3", "I1", "I2", "I3", "A1", "A2", "A3"]
STRIDES = ["sys", "syb", "syg", "syn"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def convolution_kernel(
    X, W, BIAS, Y, M, N, K, P1, P2, P3, I1, I2, I3, A1, A2, A3, S1, S2, S3, D1, D2, D3,
    sxb, sxg, sxp, sxc, sys, syb, syg, syn, sy1, sy2, sy3,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, APART: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, ALONG_M: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BM positions and BN channels of a group; APART: one part, to Y + part * sys."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    part = 0
    if APART:
        part = pid % PARTS
        pid = pid // PARTS
    g = (pid // (num_m * num_n)).to(tl.int64)
    tile_m, tile_n = tile_of(pid % (num_m * num_n), num_m, num_n)
    n = tile_n * BN + tl.arange(0, BN)
    b, p1, p2, p3 = places(tile_m, BM, P1, P2, P3)
    here = tile_m.to(tl.int64) * BM + tl.arange(0, BM) < M
    here_x = here
    i1 = p1 * S1 + A1
    i2 = p2 * S2 + A2
    i3 = p3 * S3 + A3
    if W1 == 1:
        here_x &= within(i1, I1)
    if W2 == 1:
        here_x &= within(i2, I2)
    if W3 == 1:
        here_x &= within(i3, I3)
    at = b * sxb + g * sxg + ((i1 * I2 + i2) * I3 + i3).to(tl.int64) * sxp
    weight = W + g * N * K
    if APART or PARTS == 1:
        total = chain(
            X, weight, at, i1, i2, i3, here_x, n, N, part * PART, tl.minimum(part * PART + PART, K),
            K, sxp, sxc, I1, I2, I3, D1, D2, D3, W1, W2, W3, C, KIND, EVEN, ALONG_M, BM, BN, BK,
        )  # fmt: skip
    else:
        total = tl.zeros([BM, BN], tl.float32)
        for s in tl.range(0, PARTS):
            acc = chain(
                X, weight, at, i1, i2, i3, here_x, n, N, s * PART, tl.minimum(s * PART + PART, K),
                K, sxp, sxc, I1, I2, I3, D1, D2, D3, W1, W2, W3, C, KIND, EVEN, ALONG_M, BM, BN, BK,
            )  # fmt: skip
            total = tl.math.fma(acc, tl.full(acc.shape, 1.0, tl.float32), total)
    put(
        tl.trans(total), BIAS, Y + tl.multiple_of(part * sys.to(tl.int64), RUN), b, p1, p2, p3,
        here, g, n, N, syb, syg, syn, sy1, sy2, sy3, HAS_BIAS, RUN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sxs", *SIZES[:4], *STRIDES[1:]])
def parts_kernel(
    X, BIAS, Y, M, N, P1, P2, P3, sxs, syb, syg, syn, sy1, sy2, sy3,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of X [PARTS, G, N, M], added in rising order, and the bias."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    g = (pid // (num_m * num_n)).to(tl.int64)
    tile_m = pid % num_m
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = pid // num_m % num_n * BN + tl.arange(0, BN)
    b, p1, p2, p3 = places(tile_m, BM, P1, P2, P3)
    at = tl.multiple_of((g * N + n.to(tl.int64))[:, None] * M + m[None, :], [1, RUN])
    at = tl.max_contiguous(at, [1, RUN])
    here = tl.max_constancy((n < N)[:, None] & (m < M)[None, :], [1, RUN])
    total = tl.zeros([BN, BM], tl.float32)
    for s in tl.static_range(PARTS):
        to = tl.multiple_of(at + s * sxs.to(tl.int64), [1, RUN])
        total += tl.load(X + tl.max_contiguous(to, [1, RUN]), mask=here, other=0.0)
    put(total, BIAS, Y, b, p1, p2, p3, m < M, g, n, N, syb, syg, syn, sy1, sy2, sy3, HAS_BIAS, RUN)


@triton.jit(do_not_specialize=["B", *SIZES[1:], *STRIDES[1:]])
def depthwise_kernel(
    X, W, BIAS, Y, B, G, N, P1, P2, P3, I1, I2, I3, A1, A2, A3, S1, S2, S3, D1, D2, D3,
    sxb, sxg, swg, swn, sw1, sw2, sw3, syb, syg, syn, sy1, sy2, sy3,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One channel n of a group g: ROWS lines of all images by COLUMNS positions along each."""
    after_others(PDL)
    lines = P1 * P2
    blocks = tl.cdiv(P3, COLUMNS)
    pid = tl.program_id(0)
    channel = pid % (G * N)
    pid = pid // (G * N)
    g = (channel // N).to(tl.int64)
    n = (channel % N).to(tl.int64)
    row = (pid // blocks).to(tl.int64) * ROWS
    b = row // lines
    p = (row - b * lines).to(tl.int32) + tl.arange(0, ROWS)
    b += p // lines
    p1 = p % lines // P2
    p2 = p % lines % P2
    p3 = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)
    here = (b < B)[:, None] & (p3 < P3)[None, :]
    i1 = p1 * S1 + A1
    i2 = p2 * S2 + A2
    i3 = p3 * S3 + A3
    at = (g * sxg + b * sxb + (i1 * I2 + i2) * I3)[:, None] + i3[None, :]
    weight = W + g * swg + n * swn
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for w1 in tl.static_range(W1):
        for w2 in tl.static_range(W2):
            inside_rows = (b < B) & within(i1 + w1 * D1, I1) & within(i2 + w2 * D2, I2)
            line = X + (w1 * D1 * I2 + w2 * D2) * I3 + at
            for w3 in tl.static_range(W3):
                inside = inside_rows[:, None] & within(i3 + w3 * D3, I3)[None, :]
                x = tl.load(line + w3 * D3, mask=inside, other=0.0)
                w = tl.load(weight + w1 * sw1 + w2 * sw2 + w3 * sw3).to(tl.float32)
                acc = tl.math.fma(x.to(tl.float32), tl.full(acc.shape, w, tl.float32), acc)
    if HAS_BIAS:
        acc += tl.load(BIAS + g * N + n).to(tl.float32)
    row = g * syg + n * syn + b * syb + p1.to(tl.int64) * sy1 + p2.to(tl.int64) * sy2
    out = Y + row[:, None] + (p3.to(tl.int64) * sy3)[None, :]
    tl.store(out, acc.to(Y.dtype.element_ty), mask=here)


def _filled(channels: int) -> int:
    """Channels of a pixel with the zeros behind them: a function of the channels alone."""
    return triton.next_power_of_2(channels) if channels < 8 else triton.cdiv(channels, 8) * 8


def _part(taps: int, terms: int) -> int:
    """Terms of one part of a sum: a function of channels and taps. One tap is a product."""
    if taps == 1 or terms <= PART:
        return triton.cdiv(max(terms, 1), EVEN) * EVEN
    parts = triton.cdiv(terms, PART)
    return triton.cdiv(triton.cdiv(terms, parts), EVEN) * EVEN


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
    input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, tf32,
    chosen=None,
):  # fmt: skip
    """input [B, G * C, ...], weight [G * N, C, ...], or [G * C, N, ...] if transposed."""
    sizes = output_sizes(input, weight, stride, padding, dilation, transposed, output_padding)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    out = torch.empty((input.shape[0], channels, *sizes), dtype=input.dtype, device=input.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    whole = not transposed and {*weight.shape[2:], *stride} == {1} and not any(padding)
    image = _image(_on_three_axes(input), groups, whole)
    w = _on_three_axes(weight).unflatten(0, (groups, -1))
    w = w.transpose(1, 2) if transposed else w
    axes = list(zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True))
    for r in itertools.product(*(range(s if transposed else 1) for s in stride)):
        found = [_phase(*axis, transposed, i) for axis, i in zip(axes, r, strict=True)]
        taps, places, *numbers = zip(*found, strict=True)
        y = _on_three_axes(out[(..., *places)]).unflatten(1, (groups, -1))
        if y.numel():
            _launch(image, w[(..., *taps)], bias, y, numbers, tf32, chosen)
    return out


class _Image(NamedTuple):
    """An image as it is read: data, sizes of its axes, strides by image, group, pixel, channel.

    `together`: how many pixels surely lie side by side and aligned, where channels do not.
    """

    data: torch.Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, int, int, int]
    together: int = 0


def _image(x, groups, whole):
    """x [B, G * C, I1, I2, I3]: the filled channels of a group lie side by side in each pixel.

    Of one channel, it is the pixels of an image that lie side by side; so they may, if they load
    well, where one tap meets the `whole` image.
    """
    c, sizes, pixels = x.shape[1] // groups, x.shape[2:], math.prod(x.shape[2:])
    filled = _filled(c)
    if c == filled > 1 and x.movedim(1, -1).is_contiguous():
        return _Image(x, sizes, (pixels * groups * c, c, groups * c, 1))
    together = math.gcd(pixels, 8)
    if whole and c == filled and x.is_contiguous() and together * x.element_size() >= 8:
        return _Image(x, sizes, (groups * c * pixels, c * pixels, 1, pixels), together)
    if c == 1 and x.is_contiguous():
        data = x
    elif c == 1 and _step(x) is not None:
        data = _channels_last(x.flatten(2).transpose(1, 2)[:, None, :, None, None], pixels)
    else:
        data = _channels_last(x.unflatten(1, (groups, c)), filled)
    return _Image(data, sizes, (groups * pixels * filled, pixels * filled, filled, 1))


def _step(x):
    """The stride of the last three axes, if they are as good as one, else None."""
    axes = [(n, s) for n, s in zip(x.shape[-3:], x.stride()[-3:], strict=True) if n != 1]
    if any(outer != n * inner for (_, outer), (n, inner) in itertools.pairwise(axes)):
        return None
    return axes[-1][1] if axes else 1


def _channels_last(x, filled):
    """x [R, S, C, P1, P2, P3] -> dense [R, S, P1, P2, P3, filled], zeros behind the C channels."""
    r, s, c, *sizes = x.shape
    out = torch.empty((r, s, *sizes, filled), dtype=x.dtype, device=x.device)
    p, step, (*others, last) = math.prod(sizes), _step(x), strides(x)
    bc = min(triton.next_power_of_2(filled), 64)
    bp = min(triton.next_power_of_2(p), 4096 // bc)
    launch(
        channels_last_kernel, r * s * triton.cdiv(filled, bc) * triton.cdiv(p, bp),
        x, out, s, c, p, *sizes, *others, last if step is None else step, FULL_C=filled,
        FLAT=step is not None, RUN=_run(x), BC=bc, BP=bp, num_warps=4 if bc * bp > 512 else 1,
    )  # fmt: skip
    return out


def _launch(image, w, bias, y, numbers, tf32, chosen):
    """One phase; w [G, N, C, ...], y [B, G, N, ...]; `numbers`: see `_phase`, by axis."""
    (groups, n, c, *taps), (batch, _, _, *positions) = w.shape, y.shape
    starts, steps, tap_steps = (
        [*[default] * (3 - len(given)), *given]
        for given, default in zip(numbers, (0, 1, 1), strict=True)
    )
    window = *positions, *image.sizes, *starts, *steps, *tap_steps
    added = y if bias is None else bias
    if c * math.prod(taps) == 0:
        y.copy_(y.new_zeros(()) if bias is None else bias.view(groups, n, 1, 1, 1))
    elif c == 1 and math.prod(taps) <= FEW:
        columns = min(triton.next_power_of_2(positions[2]), 256)
        lines = positions[0] * positions[1]
        rows = min(triton.next_power_of_2(lines), 1024 // columns)
        launch(
            depthwise_kernel,
            groups * n * triton.cdiv(batch * lines, rows) * triton.cdiv(positions[2], columns),
            image.data, w, added, y, batch, groups, n, *window, *image.strides[:2],
            *(strides(w)[i] for i in (0, 1, 3, 4, 5)), *strides(y), *taps,
            HAS_BIAS=bias is not None, ROWS=rows, COLUMNS=columns,
            num_warps=max(1, min(4, rows * columns // 256)),
        )  # fmt: skip
    else:
        _products(image, w, added, bias is not None, y, window, tf32, chosen)


def _products(image, w, bias, has_bias, y, window, tf32, chosen):
    """One phase as chains of `tl.dot`."""
    (groups, n, c, *taps), (batch, _, _, *positions) = w.shape, y.shape
    filled, p = _filled(c), math.prod(positions)
    if c != filled or not w.movedim(2, -1).is_contiguous():
        w = _channels_last(w, filled)
    m, k = batch * p, math.prod(taps) * filled
    terms = _part(math.prod(taps), k)
    parts = triton.cdiv(k, terms)
    kind = kind_of(y.dtype, tf32, capability(y.device))
    s = chosen or schedule(kind, groups * m * n, n)
    assert kind != "ieee" or s.bk == IEEE
    apart = s.apart and parts > 1
    sums, there, bias_here = y, (0, *strides(y)), has_bias and not apart
    if apart:
        sums = torch.empty((parts, groups, n, m), dtype=torch.float32, device=y.device)
        in_order = (math.prod(positions[i:]) for i in (1, 2, 3))
        there = groups * n * m, p, n * m, m, *in_order
    launch(
        convolution_kernel,
        groups * triton.cdiv(m, s.bm) * triton.cdiv(n, s.bn) * (parts if apart else 1),
        image.data, w, bias, sums, m, n, k, *window, *image.strides, *there, *taps, C=filled,
        PART=terms, PARTS=parts, APART=apart, KIND=kind, HAS_BIAS=bias_here, EVEN=k % s.bk == 0,
        ALONG_M=image.together, RUN=math.gcd(p, 8) if apart else _run(y),
        BM=s.bm, BN=s.bn, BK=s.bk, num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    if apart:
        launch(
            parts_kernel, groups * triton.cdiv(m, 256) * triton.cdiv(n, 4),
            sums, bias, y, m, n, *positions, groups * n * m, *strides(y), PARTS=parts,
            HAS_BIAS=has_bias, RUN=_run(y), BM=256, BN=4, num_warps=4,
        )  # fmt: skip


def _run(x):
    """How many neighbours by the last three axes surely lie side by side, aligned, up to 8."""
    together = math.gcd(math.prod(x.shape[3:]), *strides(x)[:3], 8)
    return together if _step(x) == 1 else 1
