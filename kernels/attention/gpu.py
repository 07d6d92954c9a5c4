"""Triton attention: keys in pinned chunks of pinned tiles, counted from the first visible key.

A chunk is an online softmax over its tiles; chunks are merged in rising order. One program walks
the chunks, or each chunk has a program of its own (`split`): the same numbers. A tile or a chunk
that a row does not see changes nothing of that row, so what is skipped is a matter of speed alone.
"""

import torch
import triton
import triton.language as tl

from bicompile.kernels.attention.masks import NO_KEY, ranges
from bicompile.kernels.attention.schedules import schedule, splits
from bicompile.kernels.attention.tiles import attend_chunk, merge, merge_run
from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import LOG2E, strides

CHUNK = 512  # pinned: keys of a chunk
MERGE_ROWS = 4  # rows of a program of the merge (free)
FAR = 1 << 22  # strides of keys and columns stay below this
TILE = {2: 64, 4: 32}  # pinned: keys of a tile, by bytes per element


@triton.jit
def _rows(BH, TILES, Q_LEN, H: tl.constexpr, G: tl.constexpr, R: tl.constexpr):
    """What this program computes: R rows, each a query and one of the G heads of a key head."""
    pid = tl.program_id(0)
    bh = (pid % BH).to(tl.int64)
    row = (TILES - 1 - pid // BH) * R + tl.arange(0, R)  # the longest tiles first
    here = row < Q_LEN * G
    query = tl.where(here, row // G, 0)
    return bh, bh // (H // G), row, here, query, bh % (H // G) * G + row % G


@triton.jit
def _row_ranges(
    FIRST, LAST, PLAIN, rb, rh, rq, b, h, query, here, S, MODE: tl.constexpr, R: tl.constexpr
):
    """First and last visible key of each row; 1 if every key between is seen with bias 0."""
    if MODE == "mask":
        i = b * rb + h * rh + query * rq
        first = tl.load(FIRST + i, mask=here, other=NO_KEY)
        last = tl.load(LAST + i, mask=here, other=-1)
        plain = tl.load(PLAIN + i, mask=here, other=1)
    else:
        plain = tl.full([R], 1, tl.int32)
        first = tl.where(here & (S > 0), 0, NO_KEY)
        last = tl.full([R], S - 1, tl.int32)
        if MODE == "causal":
            last = tl.minimum(query, last)
        last = tl.where(here, last, -1)
    return first, last, plain


@triton.jit
def _anchor(START, b, rs, PARTS, MODE: tl.constexpr):
    """The first key that any row of this batch row sees: chunks and tiles are counted from it."""
    anchor = 0
    if MODE == "mask":
        anchor = tl.full([], NO_KEY, tl.int32)
        for i in range(0, PARTS, 128):
            j = i + tl.arange(0, 128)
            part = tl.load(START + b * rs + j, mask=j < PARTS, other=NO_KEY)
            anchor = tl.minimum(anchor, tl.min(part, 0))
    return anchor


@triton.jit
def _span(first, last, plain, anchor, T: tl.constexpr):
    """What a program has to do.

    Tiles [t0, t1) that some row sees; those from key `head` up to tile `full` are seen whole; the
    lowest and the highest key seen; whether the ranges say all.
    """
    seen = last >= first
    top = tl.max(last, 0)
    low = tl.min(first, 0)
    t0 = tl.where(top < 0, 0, (low - anchor) // T)
    t1 = tl.where(top < 0, 0, (top - anchor) // T + 1)
    head = tl.max(tl.where(seen, first, 0), 0)
    full = (tl.min(tl.where(seen, last, NO_KEY), 0) + 1 - anchor) // T
    ranged = tl.min(plain, 0) > 0
    full = tl.where(ranged & (top >= 0), full, 0)
    return t0, t1, head, full, low, top, ranged


@triton.jit(
    do_not_specialize=["BH", "Q_LEN", "S", "TILES", "CHUNKS", "PARTS", "rb", "rh", "rq", "rs"]
)
def attention_kernel(
    Q, K, V, MASK, FIRST, LAST, PLAIN, START, OUT, TOP, SUM,
    BH, Q_LEN, S, TILES, CHUNKS, PARTS, rb, rh, rq, rs,
    sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, PER: tl.constexpr, MODE: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of R rows, batch row x key head[, chunk]); row = query x head of the group."""
    after_others(PDL)
    bh, b, row, here, query, head = _rows(BH, TILES, Q_LEN, H, G, R)
    first, last, plain = _row_ranges(
        FIRST, LAST, PLAIN, rb, rh, rq, b, head, query, here, S, MODE, R
    )
    anchor = _anchor(START, b, rs, PARTS, MODE)
    t0, t1, seen, full, low, top, ranged = _span(first, last, plain, anchor, T)
    d = tl.arange(0, DP)
    q = Q + b * sqb + head * sqh + query.to(tl.int64) * sqm
    if Q.dtype.element_ty != tl.float32:
        q = tl.load(q[:, None] + d[None, :] * sqd, mask=d[None, :] < D, other=0.0)
    k = K + b * skb + bh % (H // G) * skh
    v = V + b * svb + bh % (H // G) * svh
    bias = MASK + b * smb + head * smh + query.to(tl.int64) * smq
    mt = tl.full([R], float("-inf"), tl.float32)
    lt = tl.zeros([R], tl.float32)
    at = tl.zeros([R, DVP], tl.float32)
    c0 = t0 // PER
    c1 = tl.cdiv(t1, PER)
    if SPLIT:
        c0 = tl.maximum(c0, tl.program_id(1))
        c1 = tl.minimum(c1, tl.program_id(1) + 1)
    for c in tl.range(c0, c1):
        lo = tl.maximum(t0, c * PER)
        hi = tl.minimum(t1, c * PER + PER)
        mid = tl.where(seen <= anchor + lo * T, tl.minimum(tl.maximum(full, lo), hi), lo)
        m, l, a = attend_chunk(
            q, k, v, bias, first, last, plain, low, top, anchor, lo, mid, hi, ranged,
            sqd, sks, skd, svs, svd, sms, scale, D, DV, DP, DVP, R, T, MODE == "mask", BIAS, STAGES,
        )  # fmt: skip
        if SPLIT:
            mt, lt, at = m, l, a
        else:
            mt, lt, at = merge(mt, lt, at, m, l, a)
    blind = last < first  # beside rows that see whole tiles
    mt = tl.where(blind, float("-inf"), mt)
    lt = tl.where(blind, 0.0, lt)
    e = tl.arange(0, DVP)[None, :]
    inside = here[:, None] & (e < DV)
    if SPLIT:
        i = (bh * Q_LEN * G + row) * CHUNKS + tl.program_id(1)
        tl.store(TOP + i, mt, mask=here)
        tl.store(SUM + i, lt, mask=here)
        tl.store(OUT + i[:, None] * DV + e, at, mask=inside)
    else:
        i = ((b * Q_LEN + query) * H + head) * DV
        tl.store(OUT + i[:, None] + e, finish(lt, at, OUT), mask=inside)


@triton.jit
def finish(l, a, OUT):
    """Divide and round; a row that saw no key is 0, and a zero is +0."""
    l = tl.broadcast_to(l[:, None], a.shape)
    return tl.where(l == 0.0, 0.0, tl.div_rn(a, l) + 0.0).to(OUT.dtype.element_ty)


@triton.jit(do_not_specialize=["ROWS", "Q_LEN", "CHUNKS"])
def merge_kernel(
    TOP, SUM, ACC, OUT, ROWS, Q_LEN, CHUNKS, H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr,
    R: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (R rows, COLUMNS of the head): chunks in rising order, AHEAD of them at a time."""
    after_others(PDL)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mt = tl.full([R], float("-inf"), tl.float32)
    lt = tl.zeros([R], tl.float32)
    at = tl.zeros([R, COLUMNS], tl.float32)
    here = (row < ROWS)[None, :, None]
    for c in tl.range(0, CHUNKS, AHEAD):
        chunk = (c + tl.arange(0, AHEAD))[:, None, None]
        i = row[None, :, None] * CHUNKS + chunk
        there = here & (chunk < CHUNKS)
        m = tl.load(TOP + i, mask=there, other=float("-inf"))
        l = tl.load(SUM + i, mask=there, other=0.0)
        there = there & (e < DV)[None, None, :] & ((m != float("-inf")) | (l != 0.0))
        a = tl.load(ACC + i * DV + e[None, None, :], mask=there, other=0.0)
        mt, lt, at = merge_run(mt, lt, at, m, l, a, AHEAD)
    bh = row // (Q_LEN * G)
    query = row % (Q_LEN * G) // G
    head = bh % (H // G) * G + row % G
    i = ((bh // (H // G) * Q_LEN + query) * H + head) * DV
    inside = (row < ROWS)[:, None] & (e < DV)[None, :]
    tl.store(OUT + i[:, None] + e[None, :], finish(lt, at, OUT), mask=inside)


def _near(x: torch.Tensor) -> torch.Tensor:
    """x, copied if an offset inside one of its tiles could leave 32 bits."""
    return x if max(x.stride()[2:]) < FAR else x.contiguous()


def _mode(attn_mask, is_causal):
    return "mask" if attn_mask is not None else "causal" if is_causal else "all"


def sdpa(query, key, value, attn_mask, is_causal, scale, chosen=None, split=None, dtype=None):
    """softmax(query @ key.T * scale + mask) @ value; the memory of the output is [B, Q, H, Dv].

    For tests: `chosen` and `split` pick the schedule, which changes no bit; `dtype` float32 shows
    the result before its one rounding.
    """
    b, h, q_len, d = query.shape
    hkv, s, dv = key.shape[1], key.shape[2], value.shape[3]
    out = torch.empty((b, q_len, h, dv), dtype=dtype or query.dtype, device=query.device)
    if out.numel() == 0:
        return out.transpose(1, 2)
    dp, dvp = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    g = h // hkv
    rows, tile = q_len * g, TILE[query.element_size()]
    bias = attn_mask is not None and attn_mask.dtype != torch.bool
    use = chosen or schedule(query.element_size(), max(dp, dvp), rows)
    query, key, value = _near(query), _near(key), _near(value)
    tiles, chunks = triton.cdiv(rows, use.rows), triton.cdiv(s, CHUNK)
    if split is None:
        split = splits(tiles * b * hkv, chunks, b * hkv * rows * chunks * dv * 4)
    visible = ranges(attn_mask, b, h, q_len, s) if attn_mask is not None else None
    arrays, numbers = visible or ((out,) * 5, (0,) * 9)
    parts, *row_strides = numbers[:5]
    mask_strides = numbers[5:]
    split = split and s > 0
    top, total, acc = (out, out, out) if not split else _scratch(b * hkv * rows, chunks, dv, out)
    launch(
        attention_kernel, (tiles * b * hkv, chunks if split else 1),
        query, key, value, *arrays, acc, top, total,
        b * hkv, q_len, s, tiles, chunks, parts, *row_strides,
        *strides(query), *strides(key), *strides(value), *mask_strides, scale * LOG2E.value,
        H=h, G=g, D=d, DV=dv, DP=dp, DVP=dvp, R=use.rows, T=tile, PER=CHUNK // tile,
        MODE=_mode(attn_mask, is_causal),
        BIAS=bias, SPLIT=split, STAGES=use.stages,
        num_warps=use.warps, num_stages=use.stages, maxnreg=use.registers or None,
    )  # fmt: skip
    if split:
        columns = min(dvp, 32)
        launch(
            merge_kernel, (triton.cdiv(b * hkv * rows, MERGE_ROWS), dvp // columns),
            top, total, acc, out, b * hkv * rows, q_len, chunks,
            H=h, G=g, DV=dv, R=MERGE_ROWS, COLUMNS=columns, AHEAD=4, num_warps=1,
        )  # fmt: skip
    return out.transpose(1, 2)


def _scratch(rows, chunks, dv, like):
    """What the chunks hand to the merge: maximum, sum and weighted values of each row."""
    shapes = (rows, chunks), (rows, chunks), (rows, chunks, dv)
    return (torch.empty(n, dtype=torch.float32, device=like.device) for n in shapes)
