"""Triton device functions of the convolution: where a tile lies, and its part of a sum."""

import triton
import triton.language as tl

from bicompile.kernels.matmul.tiles import add_dot, zeros


@triton.jit
def places(tile, SIZE: tl.constexpr, P1, P2, P3):
    """Rows of a tile [SIZE] -> image (int64), position along each axis.

    One division in 64 bits for the tile; what is left fits 32.
    """
    start = tile.to(tl.int64) * SIZE
    image = start // (P1 * P2 * P3)
    p = (start - image * (P1 * P2 * P3)).to(tl.int32) + tl.arange(0, SIZE)
    ahead = p // (P1 * P2 * P3)
    p -= ahead * (P1 * P2 * P3)
    return image + ahead, p // (P2 * P3), p // P3 % P2, p % P3


@triton.jit
def chain(
    X, W, at, i1, i2, i3, here, n, N, first, last, K, sxp, sxc, I1, I2, I3, D1, D2, D3,
    W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    EVEN: tl.constexpr, ALONG_M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The chain of terms k = w * C + c from `first` to before `last`, fp32, rising from +0.

    X [.., C] holds the pixels at `at` [BM], whose places in the image are i1, i2, i3, for tap 0;
    W [N, K]. What lies outside of the image is 0. Where a step is of one tap, its place is a
    number; else each C terms have their own. `here` says of axes with one tap what lies inside.
    ALONG_M: one tap meets the whole image, and so many pixels lie side by side, not channels.
    """
    # Aligned loads of so many channels; of a pixel, they are all inside of the image or not.
    TOGETHER: tl.constexpr = C & -C if C & -C < 8 else 8
    tl.assume(first < last)
    acc = zeros(BM, BN, KIND)
    rk = tl.arange(0, BK)
    in_n = (n < N)[None, :]
    to_n = (n.to(tl.int64) * K)[None, :]
    for k in tl.range(first, last, BK):
        if ALONG_M:
            to = at[:, None] + (k + rk).to(tl.int64)[None, :] * sxc
            to = tl.max_contiguous(tl.multiple_of(to, [ALONG_M, 1]), [ALONG_M, 1])
            inside = here[:, None]
            if not EVEN:
                inside = inside & (k + rk < K)[None, :]
            x = tl.load(X + to, mask=tl.max_constancy(inside, [ALONG_M, 1]), other=0.0)
        elif C % BK == 0:
            w = k // C
            d1 = w // (W2 * W3) * D1
            d2 = w // W3 % W2 * D2
            d3 = w % W3 * D3
            inside = here
            if W1 > 1:
                inside &= within(i1 + d1, I1)
            if W2 > 1:
                inside &= within(i2 + d2, I2)
            if W3 > 1:
                inside &= within(i3 + d3, I3)
            tap = X + ((d1 * I2 + d2) * I3 + d3).to(tl.int64) * sxp + (k - w * C)
            x = tl.load(tap + at[:, None] + rk[None, :], mask=inside[:, None], other=0.0)
        else:
            w = (k + rk) // C
            c = (k + rk) % C
            d1 = w // (W2 * W3) * D1
            d2 = w // W3 % W2 * D2
            d3 = w % W3 * D3
            inside = here[:, None] & (k + rk < K)[None, :]
            if W1 > 1:
                inside &= within(i1[:, None] + d1[None, :], I1)
            if W2 > 1:
                inside &= within(i2[:, None] + d2[None, :], I2)
            if W3 > 1:
                inside &= within(i3[:, None] + d3[None, :], I3)
            to = at[:, None] + (((d1 * I2 + d2) * I3 + d3).to(tl.int64) * sxp + c)[None, :]
            to = tl.max_contiguous(tl.multiple_of(to, [1, TOGETHER]), [1, TOGETHER])
            x = tl.load(X + to, mask=tl.max_constancy(inside, [1, TOGETHER]), other=0.0)
        to = to_n + (k + rk)[:, None]
        to = tl.max_contiguous(tl.multiple_of(to, [TOGETHER, 1]), [TOGETHER, 1])
        here_w = in_n
        if not EVEN:
            here_w = tl.max_constancy(in_n & (k + rk < K)[:, None], [TOGETHER, 1])
        acc = add_dot(x, tl.load(W + to, mask=here_w, other=0.0), acc, KIND)
    return acc.to(tl.float32)


@triton.jit
def within(i, SIZE):
    """Whether 0 <= i < SIZE."""
    return i.to(tl.uint32) < SIZE.to(tl.uint32)


@triton.jit
def put(
    total, BIAS, Y, b, p1, p2, p3, here, g, n, N, syb, syg, syn, sy1, sy2, sy3,
    HAS_BIAS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Add the bias to a tile [BN, BM] and store it; RUN rows lie side by side in memory."""
    here = here[None, :] & (n < N)[:, None]
    if HAS_BIAS:
        total += tl.load(BIAS + g * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    row = b * syb + p1.to(tl.int64) * sy1 + p2.to(tl.int64) * sy2 + p3.to(tl.int64) * sy3
    to = g * syg + n.to(tl.int64)[:, None] * syn + row[None, :]
    to = tl.max_contiguous(tl.multiple_of(to, [1, RUN]), [1, RUN])
    tl.store(Y + to, total.to(Y.dtype.element_ty), mask=tl.max_constancy(here, [1, RUN]))
