"""Triton kernels of the gradient of attention: the scores are computed again, without atomics.

These are for half types, on tensor cores; float32, whose products are exact and slow, has kernels
of its own in `bicompile.kernels.attention.gradients`.

`query_kernel` owns queries of one head: first the maximum, the sum of the weights and the sum of
weight times its gradient, online over tiles of keys counted from the first visible one; then the
gradient of the query, one chain of dots over the same tiles.  `key_kernel` owns a tile of keys and
walks the queries of one head of its group after the other, in rising order, one chain of dots for
the keys and one for the values.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bicompile.kernels.attention.gradients import sdpa_backward as of_float32
from bicompile.kernels.attention.masks import NO_KEY, mask_arguments, visible_range
from bicompile.kernels.attention.tiles import LANES
from bicompile.kernels.attention_backward.tiles import (
    add_keys,
    add_queries,
    add_weights,
    load_rows,
    scores,
)
from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import LOG2E, pair_tree, strides


@dataclass(frozen=True)
class Tiles:
    """What a program owns (free), by how much it goes on (pinned), warps and stages (free)."""

    own: int
    step: int
    warps: int
    stages: int


#: For heads up to 64, 128, 256: `query_kernel` owns queries, `key_kernel` owns keys.
TILES = (
    (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    (Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3)),
    (Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1)),
)


@triton.jit(do_not_specialize=["BH", "Q_LEN", "S", "rb", "rh", "rq"])
def query_kernel(
    GRAD, Q, K, V, MASK, VISIBLE, DQ, TOP, DOT, BH, Q_LEN, S, rb, rh, rq,
    sgb, sgh, sgm, sgd, sqb, sqh, sqm, sqd, skb, skh, sks, skd,
    svb, svh, svs, svd, smb, smh, smq, sms, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, BIAS: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM queries, the last ones first; batch row x head).

    With a mask there are two launches: APART, for tiles whose rows begin at different keys, have
    holes or a bias, does nothing for the others, and the other way round.  (Triton serialises all
    dots of a kernel that has both.)  Where they are alike, the ranges say all: no mask is read.
    """
    after_others(PDL)
    bh = tl.program_id(0) % BH
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    query0 = (tl.cdiv(Q_LEN, BM) - 1 - tl.program_id(0) // BH) * BM
    query = query0 + tl.arange(0, BM)
    here = query < Q_LEN
    first = tl.zeros([BM], tl.int32)
    if MODE == "mask":
        at = VISIBLE + b * rb + h * rh + query * rq
        first = tl.load(at, mask=here, other=NO_KEY)
        last = tl.load(at + 1, mask=here, other=-1)
        plain = tl.load(at + 2, mask=here, other=1)
        start = tl.load(at + 3, mask=here, other=NO_KEY)
        sees = first <= last
        same = tl.max(tl.where(sees, start, -NO_KEY), 0) == tl.min(start, 0)
        same = same | (tl.max(last, 0) < 0)
        alike = (tl.min((plain > 0) & (~sees | (first == start)), 0) > 0) & same
        mine = tl.where(alike, 0 if APART else 1, 1 if APART else 0) > 0
        here = query < tl.where(mine, Q_LEN, 0)
        last = tl.where(here, last, -1)
        start = tl.where(here, start, NO_KEY)
        anchor = tl.min(start, 0)
        until = tl.min(tl.where(query < Q_LEN, last, NO_KEY), 0) + 1
        end = tl.max(last, 0) + 1
    else:
        last = tl.where(here, S - 1, -1)
        anchor, until, end = 0, S, S
        if MODE == "causal":
            last = tl.minimum(last, query)
            until, end = tl.minimum(query0 + 1, S), tl.minimum(query0 + BM, S)
    q = load_rows(Q + b * sqb + h * sqh, query, here[:, None], sqm, sqd, D, DP)
    g = load_rows(GRAD + b * sgb + h * sgh, query, here[:, None], sgm, sgd, DV, DVP)
    K += b * skb + h // G * skh
    V += b * svb + h // G * svh
    mask = MASK + b * smb + h * smh + query.to(tl.int64)[:, None] * smq
    slope = scale * LOG2E
    full = anchor + tl.maximum(until - anchor, 0) // BN * BN  # every row sees these tiles whole
    W: tl.constexpr = LANES if BN > LANES else BN
    m = tl.full([BM], float("-inf"), tl.float32)
    sums, dots = tl.zeros([BM, W], tl.float32), tl.zeros([BM, W], tl.float32)
    if APART:
        while anchor < NO_KEY:  # rows that begin here; the others stay as they are
            ends = tl.where(start == anchor, last, -1)
            for key0 in tl.range(anchor, end, BN, num_stages=1):
                _, x, vis, dp = scores(
                    q, g, key0, K, V, S, first, ends, mask, sks, skd, svs, svd, sms, slope,
                    D, DV, DP, DVP, BN, True, BIAS, True,
                )  # fmt: skip
                m, sums, dots = add_weights(m, sums, dots, x, vis, dp, BM, BN, True)
            anchor = tl.min(tl.where(start > anchor, start, NO_KEY), 0)
    else:
        for key0 in tl.range(anchor, full, BN, num_stages=STAGES):
            _, x, vis, dp = scores(
                q, g, key0, K, V, S, first, last, mask, sks, skd, svs, svd, sms, slope,
                D, DV, DP, DVP, BN, False, BIAS, False,
            )  # fmt: skip
            m, sums, dots = add_weights(m, sums, dots, x, vis, dp, BM, BN, False)
        for key0 in tl.range(full, end, BN, num_stages=1):
            _, x, vis, dp = scores(
                q, g, key0, K, V, S, first, last, mask, sks, skd, svs, svd, sms, slope,
                D, DV, DP, DVP, BN, False, BIAS, True,
            )  # fmt: skip
            m, sums, dots = add_weights(m, sums, dots, x, vis, dp, BM, BN, True)
    total = pair_tree(sums, BM, W)
    top = tl.where(m == float("-inf"), 0.0, m)
    dot = pair_tree(dots, BM, W) * tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))
    at = bh.to(tl.int64) * Q_LEN + query
    top = top + tl.where(total == 0.0, 0.0, tl.math.log2(total))
    tl.store(TOP + at, top, mask=here)
    tl.store(DOT + at, dot, mask=here)
    top, dot = top[:, None], dot[:, None]
    acc = tl.zeros([BM, DP], tl.float32)
    if APART:
        anchor = tl.min(start, 0)
        while anchor < NO_KEY:
            ends = tl.where(start == anchor, last, -1)
            for key0 in tl.range(anchor, end, BN, num_stages=1):
                k, x, vis, dp = scores(
                    q, g, key0, K, V, S, first, ends, mask, sks, skd, svs, svd, sms, slope,
                    D, DV, DP, DVP, BN, True, BIAS, True,
                )  # fmt: skip
                acc = add_keys(acc, k, x, vis, dp, top, dot, True)
            anchor = tl.min(tl.where(start > anchor, start, NO_KEY), 0)
    else:
        for key0 in tl.range(anchor, full, BN, num_stages=STAGES):
            k, x, vis, dp = scores(
                q, g, key0, K, V, S, first, last, mask, sks, skd, svs, svd, sms, slope,
                D, DV, DP, DVP, BN, False, BIAS, False,
            )  # fmt: skip
            acc = add_keys(acc, k, x, vis, dp, top, dot, False)
        for key0 in tl.range(full, end, BN, num_stages=1):
            k, x, vis, dp = scores(
                q, g, key0, K, V, S, first, last, mask, sks, skd, svs, svd, sms, slope,
                D, DV, DP, DVP, BN, False, BIAS, True,
            )  # fmt: skip
            acc = add_keys(acc, k, x, vis, dp, top, dot, True)
    d = tl.arange(0, DP)[None, :]
    out = DQ + ((b * Q_LEN + query) * H + h)[:, None] * D + d
    tl.store(out, (acc * scale + 0.0).to(DQ.dtype.element_ty), mask=here[:, None] & (d < D))


@triton.jit(do_not_specialize=["Q_LEN", "rb", "rh", "rq"])
def span_kernel(
    VISIBLE, SPANS, Q_LEN, TILES, HEADS, rb, rh, rq,
    BM: tl.constexpr, BN: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN keys x row of masks): queries that see it, and that see all of it.

    The first tile of queries that sees any of these keys, the run of tiles that see all of them
    (the first such run), the end of the last tile that sees any, and whether a query that sees any
    has holes or a bias.
    """
    after_others(PDL)
    tile, mask = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    low, high = tile * BN, tile * BN + BN - 1
    at = VISIBLE + (mask // HEADS).to(tl.int64) * rb + (mask % HEADS).to(tl.int64) * rh
    start, head, full, end, holes = NO_KEY, NO_KEY, Q_LEN, 0, 0
    for row0 in range(0, Q_LEN, N * BM):
        i = row0 + tl.arange(0, N) * BM
        row = i[:, None] + tl.arange(0, BM)[None, :]
        there = row < Q_LEN
        first = tl.load(at + row * rq, mask=there, other=NO_KEY)
        last = tl.load(at + row * rq + 1, mask=there, other=-1)
        whole = tl.load(at + row * rq + 2, mask=there, other=0)
        sees = (first <= high) & (last >= low)
        holes = tl.maximum(holes, tl.max(tl.max((sees & (whole == 0)).to(tl.int32), 1), 0))
        seen = tl.max(sees.to(tl.int32), 1) > 0
        all = tl.min(((first <= low) & (last >= high) & (whole > 0)).to(tl.int32), 1) > 0
        start = tl.minimum(start, tl.min(tl.where(seen, i, NO_KEY), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, i + BM, 0), 0))
        head = tl.minimum(head, tl.min(tl.where(all, i, NO_KEY), 0))
        full = tl.minimum(full, tl.min(tl.where((i > head) & (all == 0), i, NO_KEY), 0))
    full = tl.minimum(end, full)
    out = SPANS + tl.program_id(0) * 5
    tl.store(out, tl.minimum(start, end))
    tl.store(out + 1, tl.minimum(head, end))
    tl.store(out + 2, full)
    tl.store(out + 3, end)
    tl.store(out + 4, holes)


@triton.jit(do_not_specialize=["BH", "Q_LEN", "S", "rb", "rh", "rq", "nb", "nh"])
def key_kernel(
    GRAD, Q, K, V, MASK, VISIBLE, SPANS, TOP, DOT, DK, DVALUE, BH, Q_LEN, S, rb, rh, rq, nb, nh,
    sgb, sgh, sgm, sgd, sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd,
    smb, smh, smq, sms, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, BIAS: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN keys, the first ones first; batch row x key head).

    With a mask there are two launches: APART, for tiles that a query with holes or a bias sees,
    does nothing for the others, and the other way round, where no mask is read.
    """
    after_others(PDL)
    bh = tl.program_id(0) % BH
    b, kh = (bh // (H // G)).to(tl.int64), (bh % (H // G)).to(tl.int64)
    key0 = tl.program_id(0) // BH * BN
    key = key0 + tl.arange(0, BN)
    there = key < S
    spans = SPANS + (b * nb + kh * G * nh + key0 // BN) * 5
    if MODE == "mask":
        holes = 0
        for i in range(G):
            holes = tl.maximum(holes, tl.load(spans + i * nh * 5 + 4))
        mine = holes == (1 if APART else 0)
        there = key < tl.where(mine, S, 0)
    k = load_rows(K + b * skb + kh * skh, key, there[:, None], sks, skd, D, DP)
    v = load_rows(V + b * svb + kh * svh, key, there[:, None], svs, svd, DV, DVP)
    slope = scale * LOG2E
    start, head, full, end = 0, 0, Q_LEN // BM * BM, Q_LEN
    if MODE == "causal":  # rows before see none of these keys
        start = key0 // BM * BM
        head = tl.cdiv(key0 + BN, BM) * BM
    if key0 + BN > S:  # no query sees the whole tile
        full = 0
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DVP], tl.float32)
    for i in range(G):
        h = kh * G + i
        Q_of, G_of = Q + b * sqb + h * sqh, GRAD + b * sgb + h * sgh
        mask, visible = MASK + b * smb + h * smh, VISIBLE + b * rb + h * rh
        at = (b * H + h) * Q_LEN
        if MODE == "mask":
            span = spans + i * nh * 5
            start, head = tl.load(span), tl.load(span + 1)
            full, end = tl.load(span + 2), tl.where(mine, tl.load(span + 3), 0)
        head = tl.where(full > head, head, end)
        full = tl.maximum(full, head)
        for row in tl.range(start, tl.minimum(head, end), BM, num_stages=1):
            dk, dv = add_queries(
                dk, dv, k, v, row, Q_of, G_of, Q_LEN, S, key, visible, rq, TOP + at, DOT + at,
                mask, sqm, sqd, sgm, sgd, smq, sms, slope, D, DV, DP, DVP, BM, MODE, APART, BIAS,
                True,
            )  # fmt: skip
        for row in tl.range(head, tl.minimum(full, end), BM, num_stages=STAGES):
            dk, dv = add_queries(
                dk, dv, k, v, row, Q_of, G_of, Q_LEN, S, key, visible, rq, TOP + at, DOT + at,
                mask, sqm, sqd, sgm, sgd, smq, sms, slope, D, DV, DP, DVP, BM, MODE, APART, BIAS,
                False,
            )  # fmt: skip
        for row in tl.range(full, end, BM, num_stages=1):
            dk, dv = add_queries(
                dk, dv, k, v, row, Q_of, G_of, Q_LEN, S, key, visible, rq, TOP + at, DOT + at,
                mask, sqm, sqd, sgm, sgd, smq, sms, slope, D, DV, DP, DVP, BM, MODE, APART, BIAS,
                True,
            )  # fmt: skip
    d, e = tl.arange(0, DP)[None, :], tl.arange(0, DVP)[None, :]
    out = ((b * S + key) * (H // G) + kh)[:, None]
    here = there[:, None] & (d < D)
    tl.store(DK + out * D + d, (dk * scale + 0.0).to(DK.dtype.element_ty), mask=here)
    here = there[:, None] & (e < DV)
    tl.store(DVALUE + out * DV + e, (dv + 0.0).to(DVALUE.dtype.element_ty), mask=here)


def _spans(visible, q_len, tiles, t):
    """For each tile of keys the rows that see it (see `span_kernel`), and strides in tiles."""
    batch, heads = visible.shape[:2]
    out = torch.empty((batch, heads, tiles, 5), dtype=torch.int32, device=visible.device)
    launch(
        span_kernel, batch * heads * tiles, visible, out, q_len, tiles, heads,
        *strides(visible)[:3], BM=t.step, BN=t.own, N=4096 // t.step, num_warps=8,
    )  # fmt: skip
    return out, (0 if batch == 1 else heads * tiles, 0 if heads == 1 else tiles)


def sdpa_backward_visible(grad, query, key, value, attn_mask, visible, scale):
    """sdpa_backward with a mask whose ranges are known."""
    return sdpa_backward(grad, query, key, value, attn_mask, False, scale, visible)


def sdpa_backward(
    grad, query, key, value, attn_mask, is_causal, scale, visible=None, tiles=None
):  # fmt: skip
    """Gradients of sdpa with respect to query, key and value; their memory is [B, N, H, D].

    `visible`: the ranges of the mask, if they are known.
    """
    if query.dtype is torch.float32:
        return of_float32(grad, query, key, value, attn_mask, is_causal, scale)
    b, h, q_len, d = query.shape
    hkv, s, dv = key.shape[1], key.shape[2], value.shape[3]
    found = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format)
             for t in (query, key, value)]  # fmt: skip
    if query.numel() == 0 or key.numel() == 0:
        return tuple(t.zero_().transpose(1, 2) for t in found)
    dp, dvp = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    of_queries, of_keys = tiles or TILES[max(0, max(dp, dvp).bit_length() - 7)]
    arrays, numbers = (query, query), (0,) * 7
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], s)
        visible = visible_range(attn_mask) if visible is None else visible
        arrays, numbers = mask_arguments(attn_mask, visible, (b, h, q_len, s))
    stats = [torch.empty(b * h * q_len, dtype=torch.float32, device=query.device) for _ in "12"]
    steps = [n for t in (query, key, value) for n in strides(t)]
    options = {
        "H": h, "G": h // hkv, "D": d, "DV": dv, "DP": dp, "DVP": dvp,
        "MODE": "mask" if attn_mask is not None else "causal" if is_causal else "all",
        "BIAS": attn_mask is not None and attn_mask.is_floating_point(),
    }  # fmt: skip
    launches = (False, True) if attn_mask is not None else (False,)
    t = of_queries
    for apart in launches:
        launch(
            query_kernel, triton.cdiv(q_len, t.own) * b * h, grad, query, key, value, *arrays,
            found[0], *stats, b * h, q_len, s, *numbers[:3], *strides(grad), *steps,
            *numbers[3:], float(scale), **options, APART=apart,
            BM=t.own, BN=t.step, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    t = of_keys
    spans, spans_steps = query, (0, 0)
    if attn_mask is not None:
        spans, spans_steps = _spans(arrays[1], q_len, triton.cdiv(s, t.own), t)
    for apart in launches:
        launch(
            key_kernel, triton.cdiv(s, t.own) * b * hkv, grad, query, key, value, *arrays, spans,
            *stats, *found[1:], b * hkv, q_len, s, *numbers[:3], *spans_steps, *strides(grad),
            *steps, *numbers[3:], float(scale), **options, APART=apart,
            BM=t.step, BN=t.own, STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    return tuple(t.transpose(1, 2) for t in found)
