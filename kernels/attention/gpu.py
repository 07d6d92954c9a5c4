"""Triton attention: keys in pinned chunks of pinned tiles, counted from the first visible key.

A chunk is an online softmax over its tiles; chunks are merged in rising order. One program walks
the chunks, or each chunk has a program of its own (`split`): the same numbers. A tile or a chunk
that a row does not see changes nothing of that row, so what is skipped is a matter of speed alone.
Rows of a program that begin at the same key are computed together, the others one after the other.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bicompile.certificate import choose
from bicompile.kernels.attention.gradients import sdpa_backward as sdpa_backward
from bicompile.kernels.attention.masks import FAR, NO_KEY, mask_arguments, visible_range
from bicompile.kernels.attention.schedules import SINGLE, bit_class
from bicompile.kernels.attention.schedules import key as key_of
from bicompile.kernels.attention.table import may_split, schedules, splits, wanted
from bicompile.kernels.attention.tiles import attend, finish, merge_run, opaque, with_sink
from bicompile.kernels.common.launch import after_others, capability, is_aligned, launch
from bicompile.kernels.common.room import empty_with_room
from bicompile.kernels.common.trees import LOG2E, strides

CHUNK = 512  # pinned: keys of a chunk
MERGE_ROWS = 4  # rows of a program of the merge (free)
FEW = tl.constexpr(16)  # rows at a time where a program has to be careful (free)
TILE = {2: 64, 4: 32}  # pinned: keys of a tile, by bytes per element


@triton.jit
def _row_ranges(VISIBLE, rb, rh, rq, b, h, query, here, S, MODE: tl.constexpr, R: tl.constexpr):
    """First and last visible key of each row; 1 if every key between is seen with bias 0.

    And the key from which its chunks and tiles are counted, `NO_KEY` for a row that sees nothing;
    it may lie before key 0.
    """
    if MODE == "mask":
        i = VISIBLE + b * rb + h * rh + query * rq
        first = tl.load(i, mask=here, other=NO_KEY)
        last = tl.load(i + 1, mask=here, other=-1)
        plain = tl.load(i + 2, mask=here, other=1)
        start = tl.load(i + 3, mask=here, other=NO_KEY)
    else:
        plain = tl.full([R], 1, tl.int32)
        first = tl.where(here & (S > 0), 0, NO_KEY)
        last = tl.full([R], S - 1, tl.int32)
        if MODE == "causal":
            last = tl.minimum(query, last)
        last = tl.where(here, last, -1)
        start = tl.zeros([R], tl.int32)
    return first, last, plain, start


@triton.jit
def _span(first, last, here, anchor, T: tl.constexpr):
    """What a program has to do.

    Tiles [t0, t1) that some row sees; those from key `head` up to tile `full` are seen whole by
    every row; the lowest and the highest key seen.
    """
    top = tl.max(last, 0)
    low = tl.min(first, 0)
    t0 = tl.where(top < 0, 0, (low - anchor) // T)
    t1 = tl.where(top < 0, 0, (top - anchor) // T + 1)
    head = tl.max(tl.where(last >= first, first, 0), 0)
    full = (tl.min(tl.where(here, last, NO_KEY), 0) + 1 - anchor) // T
    return t0, t1, head, full, low, top


@triton.jit
def _places(
    pid, r, BH, TILES, Q_LEN, H: tl.constexpr, G: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):
    """N of the R rows of a program, from its row r: pairs of a query and a head of one key head.

    Batch row, key head, first query; of each row its number, query and head within the group.
    """
    bh = pid % BH
    row0 = (TILES - 1 - pid // BH) * R + r  # the longest tiles first
    row = row0 + tl.arange(0, N)
    query = tl.minimum((row.to(tl.uint32) // G).to(tl.int32), Q_LEN - 1)
    kv: tl.constexpr = H // G
    g = (row.to(tl.uint32) % G).to(tl.int32)
    return (bh // kv).to(tl.int64), (bh % kv).to(tl.int64), row0 // G, row, query, g


@triton.jit
def _write(
    m, l, a, ok, b, kh, query0, row, query, g, OUT, TOP, SUM, Q_LEN, CHUNKS,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The rows that are ok: what a chunk hands to the merge, or the result."""
    here = row < tl.where(ok, Q_LEN * G, 0)
    e = tl.arange(0, DVP)[None, :]
    inside = here[:, None] & (e < DV)
    if SPLIT:
        i = ((b * (H // G) + kh) * Q_LEN * G + row) * CHUNKS + tl.program_id(1)
        tl.store(TOP + i, m, mask=here)
        tl.store(SUM + i, l, mask=here)
        tl.store(OUT + i[:, None] * DV + e, a, mask=inside)
    else:
        OUT += ((b * Q_LEN + query0) * H + kh * G) * DV
        i = ((query - query0) * H + g) * DV
        tl.store(OUT + i[:, None] + e, finish(l, a, OUT), mask=inside)


@triton.jit
def _attend_from(
    anchor, first, last, here, ok, plain, q, K, V, KT, VT, MASK, b, kh,
    sqd, sks, skd, svs, svd, sms, scale, bend,
    SIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, CAREFUL: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Attention of rows whose chunks are counted from `anchor`; of no chunk, if not `ok`."""
    # Less the chunks before the first that these rows see: a window may have left them behind.
    low = tl.min(first, 0)
    anchor += tl.where(low < NO_KEY, (low - anchor) // (T * PER), 0) * (T * PER)
    t0, t1, begin, full, low, top = _span(first, last, here, anchor, T)
    c0 = t0 // PER
    c1 = tl.cdiv(t1, PER)
    if SPLIT:
        c0 = tl.maximum(c0, tl.program_id(1))
        c1 = tl.minimum(c1, tl.program_id(1) + 1)
    c1 = tl.where(ok, c1, c0)
    return attend(
        q, K, V, KT, VT, MASK, first, last, plain, b.to(tl.int32), kh.to(tl.int32), anchor,
        t0, t1, c0, c1, begin, full, low, top, sqd, sks, skd, svs, svd, sms, scale, bend,
        SIGN, D, DV, DP, DVP, N, T, PER, SPLIT, STAGES, TMA, MASKED, BIAS, CAREFUL, CAP,
    )  # fmt: skip


@triton.jit
def _rows(
    pid, r, Q, K, V, KT, VT, MASK, VISIBLE, SINKS, OUT, TOP, SUM,
    BH, Q_LEN, S, TILES, CHUNKS, rb, rh, rq,
    sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms, scale, bend,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, T: tl.constexpr, PER: tl.constexpr,
    MODE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, SIGN: tl.constexpr,
    TMA: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """N of the R rows of a program, from its row r.

    Returns whether they are done. If not, nothing is written: without MASKED where the rows begin
    at several keys or their ranges do not say all; without CAREFUL where a sum is not finite, for
    NaN may come from a value that the row does not see, times a weight of 0.
    """
    b, kh, query0, row, query, g = _places(pid, r, BH, TILES, Q_LEN, H, G, R, N)
    here, head = row < Q_LEN * G, kh * G + g
    first, last, plain, start = _row_ranges(VISIBLE, rb, rh, rq, b, head, query, here, S, MODE, N)
    ok, anchor = pid >= 0, 0
    if MODE == "mask":
        anchor = tl.min(start, 0)
        if not MASKED:
            alike = (start == anchor) | (start == NO_KEY)
            ok = tl.min(tl.where(alike, plain, 0), 0) > 0
    q = Q + b * sqb + query0.to(tl.int64) * sqm + head * sqh + (query - query0) * sqm
    mask = MASK + b * smb + head * smh + query.to(tl.int64) * smq
    if MODE == "mask" and MASKED:
        m = tl.full([N], float("-inf"), tl.float32)
        l, a = tl.zeros([N], tl.float32), tl.zeros([N, DVP], tl.float32)
        while anchor < NO_KEY:  # rows that begin here
            mine = start == anchor
            mm, ll, aa = _attend_from(
                anchor, tl.where(mine, first, NO_KEY), tl.where(mine, last, -1), here & mine, ok,
                plain, q, K + b * skb + kh * skh, V + b * svb + kh * svh, KT, VT, mask, b, kh,
                sqd, sks, skd, svs, svd, sms, scale, bend,
                SIGN, D, DV, DP, DVP, N, T, PER, SPLIT, STAGES, TMA, MASKED, BIAS, CAREFUL, CAP,
            )  # fmt: skip
            m, l = tl.where(mine, mm, m), tl.where(mine, ll, l)
            a = tl.where(mine[:, None], aa, a)
            anchor = tl.min(tl.where(start > anchor, start, NO_KEY), 0)
    else:
        m, l, a = _attend_from(
            anchor, first, last, here, ok,
            plain, q, K + b * skb + kh * skh, V + b * svb + kh * svh, KT, VT, mask, b, kh,
            sqd, sks, skd, svs, svd, sms, scale, bend,
            SIGN, D, DV, DP, DVP, N, T, PER, SPLIT, STAGES, TMA, MASKED, BIAS, CAREFUL, CAP,
        )  # fmt: skip
    # Found again, not kept: the loop needs all registers.
    b, kh, query0, row, query, g = _places(opaque(pid), r, BH, TILES, Q_LEN, H, G, R, N)
    if SINK and not SPLIT:
        l, a = with_sink(m, l, a, SINKS, kh * G + g, row < Q_LEN * G, scale)
    if MODE != "all" and not CAREFUL:
        total = tl.sum(a, 1)  # a test: its bits go nowhere
        wild = (row < Q_LEN * G) & (total - total != 0.0)
        ok = ok & (tl.max(wild.to(tl.int32), 0) < 1)
    _write(
        m, l, a, ok, b, kh, query0, row, query, g, OUT, TOP, SUM, Q_LEN, CHUNKS, H, G, DV, DVP,
        SPLIT,
    )  # fmt: skip
    return ok


@triton.jit(do_not_specialize=["BH", "Q_LEN", "S", "TILES", "CHUNKS", "rb", "rh", "rq"])
def attention_kernel(
    Q, K, V, KT, VT, MASK, VISIBLE, SINKS, OUT, TOP, SUM,
    BH, Q_LEN, S, TILES, CHUNKS, rb, rh, rq,
    sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms, scale, bend,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, PER: tl.constexpr, MODE: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, SIGN: tl.constexpr, TMA: tl.constexpr,
    CAP: tl.constexpr, SINK: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of R rows, batch row x key head[, chunk]); what is not done is done again."""
    after_others(PDL)
    pid = tl.program_id(0)
    ok = _rows(
        pid, 0, Q, K, V, KT, VT, MASK, VISIBLE, SINKS, OUT, TOP, SUM,
        BH, Q_LEN, S, TILES, CHUNKS, rb, rh, rq,
        sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms, scale, bend,
        H, G, D, DV, DP, DVP, R, R, T, PER, MODE, BIAS, SPLIT, SIGN, TMA, CAP, SINK,
        STAGES, False, False,
    )  # fmt: skip
    if MODE != "all":
        for r in tl.range(0, tl.where(ok, 0, R), FEW, num_stages=1):
            if MODE == "mask":
                ok = _rows(
                    opaque(pid), r, Q, K, V, KT, VT, MASK, VISIBLE, SINKS, OUT, TOP, SUM,
                    BH, Q_LEN, S, TILES, CHUNKS, rb, rh, rq,
                    sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms,
                    scale, bend, H, G, D, DV, DP, DVP, R, FEW, T, PER, MODE, BIAS, SPLIT, SIGN, TMA,
                    CAP, SINK, 2, True, False,
                )  # fmt: skip
            for _ in tl.range(0, tl.where(ok, 0, 1), num_stages=1):
                _rows(
                    opaque(pid), r, Q, K, V, KT, VT, MASK, VISIBLE, SINKS, OUT, TOP, SUM,
                    BH, Q_LEN, S, TILES, CHUNKS, rb, rh, rq,
                    sqb, sqh, sqm, sqd, skb, skh, sks, skd, svb, svh, svs, svd, smb, smh, smq, sms,
                    scale, bend, H, G, D, DV, DP, DVP, R, FEW, T, PER, MODE, BIAS, SPLIT, SIGN,
                    False, CAP, SINK, 1, MODE == "mask", True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["ROWS", "Q_LEN", "CHUNKS"])
def merge_kernel(
    TOP, SUM, ACC, SINKS, OUT, ROWS, Q_LEN, CHUNKS, scale, H: tl.constexpr, G: tl.constexpr,
    DV: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
    SINK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (R rows, COLUMNS of the head): chunks in rising order, AHEAD of them at a time."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mt = tl.full([R], float("-inf"), tl.float32)
    lt = tl.zeros([R], tl.float32)
    at = tl.zeros([R, COLUMNS], tl.float32)
    bh = row // (Q_LEN * G)
    query = row % (Q_LEN * G) // G
    head = bh % (H // G) * G + row % G
    out = ((bh // (H // G) * Q_LEN + query) * H + head) * DV
    here = (row < ROWS)[None, :, None]
    after_others(PDL)
    for c in tl.range(0, CHUNKS, AHEAD):
        chunk = (c + tl.arange(0, AHEAD))[:, None, None]
        i = row[None, :, None] * CHUNKS + chunk
        there = here & (chunk < CHUNKS)
        m = tl.load(TOP + i, mask=there, other=float("-inf"))
        l = tl.load(SUM + i, mask=there, other=0.0)
        there = there & (e < DV)[None, None, :]
        a = tl.load(ACC + i * DV + e[None, None, :], mask=there, other=0.0)
        mt, lt, at = merge_run(mt, lt, at, m, l, a, scale, AHEAD)
    if SINK:
        lt, at = with_sink(mt, lt, at, SINKS, head, row < ROWS, scale)
    inside = (row < ROWS)[:, None] & (e < DV)[None, :]
    tl.store(OUT + out[:, None] + e[None, :], finish(lt, at, OUT), mask=inside)


def _near(x: torch.Tensor) -> torch.Tensor:
    """x, copied if an offset inside one of its tiles could leave 32 bits."""
    return x if max(x.stride()[2:]) < FAR else x.contiguous()


def _mode(attn_mask, is_causal):
    return "mask" if attn_mask is not None else "causal" if is_causal else "all"


def sdpa_visible(query, key, value, attn_mask, visible, scale, softcap=0.0, sinks=None):
    """sdpa with a mask whose ranges are known."""
    return sdpa(query, key, value, attn_mask, False, scale, softcap, sinks, visible)


def sdpa(
    query, key, value, attn_mask, is_causal, scale, softcap=0.0, sinks=None, visible=None,
    chosen=None, split=None, dtype=None,
):  # fmt: skip
    """softmax(capped(query @ key.T * scale) + mask) @ value; memory of the output: [B, Q, H, Dv].

    `visible`: the ranges of the mask, if they are known. For tests: `chosen` and `split` pick the
    schedule, which changes no bit; `dtype` float32 shows the result before its one rounding.
    """
    b, h, q_len, d = query.shape
    hkv, s, dv = key.shape[1], key.shape[2], value.shape[3]
    like = {"dtype": dtype or query.dtype, "device": query.device}
    out = empty_with_room(b * q_len, h, dv, **like).view(b, q_len, h, dv)  # a product follows
    if out.numel() == 0:
        return out.transpose(1, 2)
    dp, dvp = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    g = h // hkv
    rows, tile = q_len * g, TILE[query.element_size()]
    use = chosen or _schedule(query.element_size(), max(dp, dvp), rows, capability(query.device))
    query, key, value = _near(query), _near(key), _near(value)
    numbered = attn_mask is not None and attn_mask.dtype == torch.int32
    # Keys of a window start anywhere in a chunk.
    tiles, chunks = triton.cdiv(rows, use.rows), triton.cdiv(s + numbered * (CHUNK - 1), CHUNK)
    if split is None:
        split = _split(tiles * b * hkv, chunks, b * hkv * rows * chunks * dv * 4)
    split, bias = split and s > 0, attn_mask is not None and attn_mask.is_floating_point()
    arrays, numbers = (out, out), (0,) * 7
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], s)
        visible = visible_range(attn_mask) if visible is None else visible
        arrays, numbers = mask_arguments(attn_mask, visible, (b, h, q_len, s))
    top, total, acc = _scratch(b * hkv * rows, chunks, dv, out) if split else (out,) * 3
    tma = use.tma and _has_boxes(key) and _has_boxes(value)
    boxes = (_boxes(key, tile, dp), _boxes(value, tile, dvp)) if tma else (key, value)
    sign, scale = (math.copysign(1.0, scale), abs(scale)) if scale else (0.0, 1.0)
    bend, scale = (scale / abs(softcap), abs(softcap)) if softcap else (1.0, scale)
    scale *= LOG2E.value
    has_sinks, sinks = sinks is not None, out if sinks is None else sinks.contiguous()
    launch(
        attention_kernel, (tiles * b * hkv, chunks if split else 1),
        query, key, value, *boxes, *arrays, sinks, acc, top, total,
        b * hkv, q_len, s, tiles, chunks, *numbers[:3],
        *strides(query), *strides(key), *strides(value), *numbers[3:], scale, bend,
        H=h, G=g, D=d, DV=dv, DP=dp, DVP=dvp, R=use.rows, T=tile, PER=CHUNK // tile,
        MODE=_mode(attn_mask, is_causal), BIAS=bias, SPLIT=split, SIGN=sign, TMA=tma,
        CAP=bool(softcap), SINK=has_sinks, STAGES=use.stages,
        num_warps=use.warps, num_stages=use.stages, maxnreg=use.registers or None,
    )  # fmt: skip
    if split:
        _merge(top, total, acc, sinks, out, hkv, scale, has_sinks)
    return out.transpose(1, 2)


def _schedule(size, head, rows, capability):
    """The table's schedule of a group of `rows` rows."""
    at = key_of(size, head)
    best = wanted(at, rows, capability)
    return choose("attention", bit_class(*at), best, SINGLE[at], lambda: schedules(at, capability))


def _split(tiles, chunks, scratch):
    """Whether each chunk of keys gets a program of its own (a bit class by itself)."""
    best, can = splits(tiles, chunks, scratch), may_split(chunks, scratch)
    return choose("attention", "split", best, False, lambda: (can, False))


def _merge(top, total, acc, sinks, out, hkv, scale, has_sinks):
    _, q_len, h, dv = out.shape
    (rows, chunks), dvp = top.shape, triton.next_power_of_2(dv)
    columns = min(max(dvp, 16), 32)
    launch(
        merge_kernel, (triton.cdiv(rows, MERGE_ROWS), triton.cdiv(dvp, columns)),
        top, total, acc, sinks, out, rows, q_len, chunks, scale,
        H=h, G=h // hkv, DV=dv, R=MERGE_ROWS, COLUMNS=columns, AHEAD=4 if chunks <= 4 else 8,
        SINK=has_sinks, num_warps=1,
    )  # fmt: skip


def _has_boxes(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read tiles of x."""
    steps = [s * x.element_size() for n, s in zip(x.shape[:3], x.stride(), strict=False) if n > 1]
    aligned = is_aligned(x) and all(n > 0 and n % 16 == 0 for n in steps)
    return aligned and x.stride(3) == 1 and x.element_size() == 2 and x.numel() > 0


def _boxes(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles [rows, columns] of the heads of x; beyond its end they are 0."""
    steps = [s if n > 1 else 16 for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, rows, columns])


def _scratch(rows, chunks, dv, like):
    """What the chunks hand to the merge: maximum, sum and weighted values of each row."""
    shapes = (rows, chunks), (rows, chunks), (rows, chunks, dv)
    return (torch.empty(n, dtype=torch.float32, device=like.device) for n in shapes)
