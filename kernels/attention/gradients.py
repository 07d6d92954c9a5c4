"""Triton gradients of attention: two kernels that compute the scores again, without atomics.

`query_kernel` owns rows: first the maximum, the sum of the weights and the sum of weight times its
gradient, online over tiles of keys counted from the first visible one; then the gradient of the
query, one chain of dots over the same tiles. `key_kernel` owns a tile of keys and walks the rows of
their group in rising order, one chain of dots for the keys and one for the values.
"""

import torch
import triton
import triton.language as tl

from bicompile.kernels.attention.masks import NO_KEY, mask_arguments, visible_range
from bicompile.kernels.attention.tiles import LANES, _fold, _seen
from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import LOG2E, pair_tree, strides

TILES = {2: (64, 64, 32), 4: (32, 32, 16)}  # pinned: by bytes, for heads up to 64, 128, 256


@triton.jit
def _vectors(X, n, there, stride, column_stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows n of a matrix, [N, DP]; what is not there is 0."""
    d = tl.arange(0, DP)[None, :]
    at = n.to(tl.int64)[:, None] * stride + d * column_stride
    return tl.load(X + at, mask=there[:, None] & (d < D), other=0.0)


@triton.jit
def _finite(x):
    """x without NaN and inf: the other operand is NaN already where they are seen."""
    return tl.where(x - x == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def _scores(
    q, k, here, query, key, there, MASK, sms, scale, MODE: tl.constexpr, BIAS: tl.constexpr
):
    """Scores of a tile in units of log2, -inf where a key is not seen, and which are seen."""
    x = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
    vis = here[:, None] & there[None, :]
    if MODE == "causal":
        vis = vis & (key[None, :] <= query[:, None])
    elif MODE == "mask":
        m = tl.load(MASK[:, None] + key.to(tl.int64)[None, :] * sms, mask=vis, other=0)
        if BIAS:
            m = m.to(tl.float32)
            vis = vis & (m != float("-inf"))
            x = x + m * LOG2E
        else:
            vis = vis & _seen(m)
    return tl.where(vis, x, float("-inf")), vis


@triton.jit
def _row(row, kh, Q_LEN, G: tl.constexpr):
    """Which rows of a group there are, their queries and heads."""
    query = tl.minimum(row // G, Q_LEN - 1)
    return row < Q_LEN * G, query, kh * G + row % G


@triton.jit
def _slope(x, vis, dp, top, over, dot, scale):
    """Weights and gradients of the scores of a tile; 0 where a NaN of the row is not seen."""
    p = tl.where(vis, tl.math.exp2(x - top[:, None]) * over[:, None], 0.0)
    return p, tl.where(vis, p * (dp - dot[:, None]) * scale, 0.0)


@triton.jit
def _add_dot(acc, a, b):
    """acc + a @ b; in float32 the product of a tile first, so that a long chain loses no digits."""
    if b.dtype == tl.float32:
        # Triton makes acc the start of a dot that is added to it, unless the dot has a limit.
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=16)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit(do_not_specialize=["BH", "Q_LEN", "S", "rb", "rh", "rq"])
def query_kernel(
    GRAD, Q, K, V, MASK, VISIBLE, DQ, TOP, OVER, DOT, BH, Q_LEN, S, rb, rh, rq,
    sgb, sgh, sgm, sgd, sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd,
    smb, smh, smq, sms, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, T: tl.constexpr, MODE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of T rows, batch row x key head)."""
    after_others(PDL)
    bh = tl.program_id(0) % BH
    b, kh = (bh // (H // G)).to(tl.int64), (bh % (H // G)).to(tl.int64)
    row = tl.program_id(0) // BH * T + tl.arange(0, T)
    here, query, head = _row(row, kh, Q_LEN, G)
    q = _vectors(Q + b * sqb + head[:, None] * sqh, query, here, sqm, sqd, D, DP)
    g = _vectors(GRAD + b * sgb + head[:, None] * sgh, query, here, sgm, sgd, DV, DVP)
    K += b * skb + kh * skh
    V += b * svb + kh * svh
    mask = MASK + b * smb + head * smh + query.to(tl.int64) * smq
    start, end = tl.zeros([T], tl.int32), S
    if MODE == "mask":
        at = VISIBLE + b * rb + head * rh + query * rq + 3
        start = tl.load(at, mask=here, other=NO_KEY)
    elif MODE == "causal":
        end = tl.minimum(S, tl.max(query, 0) + 1)
    W: tl.constexpr = LANES if T > LANES else T
    m = tl.full([T], float("-inf"), tl.float32)
    sums, dots = tl.zeros([T, W], tl.float32), tl.zeros([T, W], tl.float32)
    anchor = tl.min(start, 0)
    while anchor < NO_KEY:  # rows that begin here; the others stay as they are
        mine = here & (start == anchor)
        for key0 in range(anchor, end, T):
            key = key0 + tl.arange(0, T)
            there = (key >= 0) & (key < S)
            k = _vectors(K, key, there, sks, skd, D, DP)
            v = _vectors(V, key, there, svs, svd, DV, DVP)
            x, vis = _scores(q, k, mine, query, key, there, mask, sms, scale, MODE, BIAS)
            dp = tl.dot(g, v.T, input_precision="ieee")
            m_new = tl.maximum(m, tl.max(x, 1))
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.math.exp2(x - top[:, None])
            factor = tl.math.exp2(m - top)[:, None]
            sums = sums * factor + _fold(p, T, T)
            dots = dots * factor + _fold(tl.where(vis, p * dp, 0.0), T, T)
            m = m_new
        anchor = tl.min(tl.where(start > anchor, start, NO_KEY), 0)
    total = pair_tree(sums, T, W)
    over = tl.where(total == 0.0, 0.0, tl.div_rn(1.0, total))
    dot = pair_tree(dots, T, W) * over
    top = tl.where(m == float("-inf"), 0.0, m)
    at = bh.to(tl.int64) * Q_LEN * G + row
    tl.store(TOP + at, top, mask=here)
    tl.store(OVER + at, over, mask=here)
    tl.store(DOT + at, dot, mask=here)
    acc = tl.zeros([T, DP], tl.float32)
    anchor = tl.min(start, 0)
    while anchor < NO_KEY:
        mine = here & (start == anchor)
        for key0 in range(anchor, end, T):
            key = key0 + tl.arange(0, T)
            there = (key >= 0) & (key < S)
            k = _vectors(K, key, there, sks, skd, D, DP)
            v = _vectors(V, key, there, svs, svd, DV, DVP)
            x, vis = _scores(q, k, mine, query, key, there, mask, sms, scale, MODE, BIAS)
            dp = tl.dot(g, v.T, input_precision="ieee")
            _, ds = _slope(x, vis, dp, top, over, dot, scale)
            acc = _add_dot(acc, ds.to(k.dtype), _finite(k))
        anchor = tl.min(tl.where(start > anchor, start, NO_KEY), 0)
    d = tl.arange(0, DP)[None, :]
    out = DQ + ((b * Q_LEN + query) * H + head)[:, None] * D + d
    tl.store(out, (acc + 0.0).to(DQ.dtype.element_ty), mask=here[:, None] & (d < D))


@triton.jit(do_not_specialize=["BH", "Q_LEN", "S"])
def key_kernel(
    GRAD, Q, K, V, MASK, TOP, OVER, DOT, DK, DVALUE, BH, Q_LEN, S,
    sgb, sgh, sgm, sgd, sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd,
    smb, smh, smq, sms, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, T: tl.constexpr, MODE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of T keys, batch row x key head)."""
    after_others(PDL)
    bh = tl.program_id(0) % BH
    b, kh = (bh // (H // G)).to(tl.int64), (bh % (H // G)).to(tl.int64)
    key = tl.program_id(0) // BH * T + tl.arange(0, T)
    there = key < S
    k = _vectors(K + b * skb + kh * skh, key, there, sks, skd, D, DP)
    v = _vectors(V + b * svb + kh * svh, key, there, svs, svd, DV, DVP)
    start = 0
    if MODE == "causal":  # rows before see none of these keys
        start = tl.min(key, 0) * G // T * T
    dk, dv = tl.zeros([T, DP], tl.float32), tl.zeros([T, DVP], tl.float32)
    for row0 in range(start, Q_LEN * G, T):
        row = row0 + tl.arange(0, T)
        here, query, head = _row(row, kh, Q_LEN, G)
        q = _vectors(Q + b * sqb + head[:, None] * sqh, query, here, sqm, sqd, D, DP)
        g = _vectors(GRAD + b * sgb + head[:, None] * sgh, query, here, sgm, sgd, DV, DVP)
        mask = MASK + b * smb + head * smh + query.to(tl.int64) * smq
        at = bh.to(tl.int64) * Q_LEN * G + row
        top = tl.load(TOP + at, mask=here, other=0.0)
        over = tl.load(OVER + at, mask=here, other=0.0)
        dot = tl.load(DOT + at, mask=here, other=0.0)
        x, vis = _scores(q, k, here, query, key, there, mask, sms, scale, MODE, BIAS)
        dp = tl.dot(g, v.T, input_precision="ieee")
        p, ds = _slope(x, vis, dp, top, over, dot, scale)
        wild = tl.max((g - g != 0.0).to(tl.int32), 1) > 0
        p = tl.where(vis & wild[:, None], float("nan"), p)
        dv = _add_dot(dv, p.to(g.dtype).T, _finite(g))
        dk = _add_dot(dk, ds.to(q.dtype).T, _finite(q))
    d, e = tl.arange(0, DP)[None, :], tl.arange(0, DVP)[None, :]
    out = ((b * S + key) * (H // G) + kh)[:, None]
    tl.store(DK + out * D + d, (dk + 0.0).to(DK.dtype.element_ty), mask=there[:, None] & (d < D))
    here = there[:, None] & (e < DV)
    tl.store(DVALUE + out * DV + e, (dv + 0.0).to(DVALUE.dtype.element_ty), mask=here)


def sdpa_backward(grad, query, key, value, attn_mask, is_causal, scale):
    """Gradients of sdpa with respect to query, key and value; their memory is [B, N, H, D]."""
    b, h, q_len, d = query.shape
    hkv, s, dv = key.shape[1], key.shape[2], value.shape[3]
    found = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format)
             for t in (query, key, value)]  # fmt: skip
    if query.numel() == 0 or key.numel() == 0:
        return tuple(t.zero_().transpose(1, 2) for t in found)
    dp, dvp = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    tile = TILES[query.element_size()][max(0, max(dp, dvp).bit_length() - 7)]
    arrays, numbers = (query, query), (0,) * 7
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], s)
        arrays, numbers = mask_arguments(attn_mask, visible_range(attn_mask), (b, h, q_len, s))
    rows = q_len * (h // hkv)
    stats = [torch.empty(b * hkv * rows, dtype=torch.float32, device=query.device) for _ in "123"]
    inputs = (grad, query, key, value)
    steps = [n for t in inputs for n in strides(t)]
    options = {
        "H": h, "G": h // hkv, "D": d, "DV": dv, "DP": dp, "DVP": dvp, "T": tile,
        "MODE": "mask" if attn_mask is not None else "causal" if is_causal else "all",
        "BIAS": attn_mask is not None and attn_mask.is_floating_point(),
        "num_warps": 4 if max(dp, dvp) <= 64 else 8, "num_stages": 1,
    }  # fmt: skip
    launch(
        query_kernel, triton.cdiv(rows, tile) * b * hkv, *inputs, *arrays, found[0], *stats,
        b * hkv, q_len, s, *numbers[:3], *steps, *numbers[3:], float(scale), **options,
    )  # fmt: skip
    launch(
        key_kernel, triton.cdiv(s, tile) * b * hkv, *inputs, arrays[0], *stats, *found[1:],
        b * hkv, q_len, s, *steps, *numbers[3:], float(scale), **options,
    )  # fmt: skip
    return tuple(t.transpose(1, 2) for t in found)
