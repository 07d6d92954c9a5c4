"""Triton device functions of attention: tiles, chunks and their merge (see `gpu`)."""

import triton
import triton.language as tl

from bicompile.kernels.common.trees import LOG2E, pair_tree

LANES = tl.constexpr(8)  # pinned: lanes of the sum of weights


@triton.jit
def _row_lanes(p, R: tl.constexpr, T: tl.constexpr):
    """[R, T] -> [R, LANES]: columns LANES apart are folded by halves."""
    for i in tl.static_range(8):
        if (T >> (i + 1)) >= LANES:
            p = tl.sum(tl.reshape(p, [R, 2, T >> (i + 1)]), 1)
    return p


@triton.jit
def _weigh(s, m, lanes, acc, R: tl.constexpr, T: tl.constexpr):
    """Weights of a tile of logits (base 2; unseen: -inf) and the rescaled state.

    Exact no-op for a row that sees nothing here: the difference comes first, so the factor is 1.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s - top[:, None])
    factor = tl.math.exp2(m - top)
    lanes = lanes * factor[:, None] + _row_lanes(p, R, T)
    return p, m_new, lanes, acc * factor[:, None]


@triton.jit
def _add_special(p, vis, x, bad, acc, TYPE: tl.constexpr):
    """Add inf and NaN values to the rows that see them, as p @ v would (inf * 0 is NaN).

    Counts, exact in any order: +inf in units of 1, -inf of 128, NaN of 16384; a tile has 64 keys.
    """
    code = tl.where(x == float("inf"), 1.0, tl.where(x == float("-inf"), 128.0, 16384.0))
    code = tl.where(bad, code, 0.0).to(TYPE)
    lost = tl.where(bad, 16384.0, 0.0).to(TYPE)
    n = tl.dot((vis & (p > 0)).to(TYPE), code, input_precision="ieee")
    n = tl.dot((vis & (p == 0)).to(TYPE), lost, n, input_precision="ieee").to(tl.int32)
    extra = tl.where(n % 128 > 0, float("inf"), 0.0)
    extra = extra + tl.where(n // 128 % 128 > 0, float("-inf"), 0.0)
    extra = tl.where(n // 16384 > 0, float("nan"), extra)
    return tl.where(n > 0, acc + extra, acc)


@triton.jit
def _add_values(p, vis, v, acc):
    """acc + p @ v, where the value of a key that a row does not see adds nothing, not even NaN."""
    x = v.to(tl.float32)
    bad = (x - x) != 0.0
    p = p.to(v.dtype)
    acc = tl.dot(p, tl.where(bad, 0.0, v).to(v.dtype), acc, input_precision="ieee")
    if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
        acc = _add_special(p.to(tl.float32), vis, x, bad, acc, v.dtype)
    return acc


@triton.jit
def _load(X, key, there, stride, column_stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows `key` of K or V, [T, DP]; 0 where there is nothing to see."""
    d = tl.arange(0, DP)
    at = key.to(tl.int64)[:, None] * stride + d[None, :] * column_stride
    return tl.load(X + at, mask=there[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _load_full(X, key, stride, column_stride, D: tl.constexpr, DP: tl.constexpr):
    """The same for a tile that is seen whole."""
    d = tl.arange(0, DP)
    at = key.to(tl.int64)[:, None] * stride + d[None, :] * column_stride
    if D == DP:
        x = tl.load(X + at)
    else:
        x = tl.load(X + at, mask=d[None, :] < D, other=0.0)
    return x


@triton.jit
def attend_chunk(
    q, K, V, MASK, first, last, plain, low, top, anchor, lo, mid, hi,
    sks, skd, svs, svd, sms, scale,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [lo, mid), which every row sees whole, then [mid, hi): maximum, sum, weighted values."""
    m = tl.full([R], float("-inf"), tl.float32)
    lanes = tl.zeros([R, LANES], tl.float32)
    acc = tl.zeros([R, DVP], tl.float32)
    for t in tl.range(lo, mid, num_stages=STAGES):
        key = anchor + t * T + tl.arange(0, T)
        k = _load_full(K, key, sks, skd, D, DP)
        v = _load_full(V, key, svs, svd, DV, DVP)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        p, m, lanes, acc = _weigh(s, m, lanes, acc, R, T)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    for t in tl.range(mid, hi, num_stages=STAGES):
        key = anchor + t * T + tl.arange(0, T)
        there = (key >= low) & (key <= top)
        k = _load(K, key, there, sks, skd, D, DP)
        v = _load(V, key, there, svs, svd, DV, DVP)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        vis = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        if MASKED:
            if not plain:
                at = MASK[:, None] + key.to(tl.int64)[None, :] * sms
                x = tl.load(at, mask=vis, other=0)
                if BIAS:
                    x = x.to(tl.float32)
                    vis = vis & (x != float("-inf"))
                    s = s + x * LOG2E
                else:
                    vis = vis & (x != 0)
        s = tl.where(vis, s, float("-inf"))
        p, m, lanes, acc = _weigh(s, m, lanes, acc, R, T)
        acc = _add_values(p, vis, v, acc)
    return m, pair_tree(lanes, R, LANES), acc


@triton.jit
def merge(mt, lt, at, m, l, a):
    """Join the next chunk to what came before; exact no-op when either saw nothing."""
    mn = tl.maximum(mt, m)
    top = tl.where(mn == float("-inf"), 0.0, mn)
    old = tl.math.exp2(mt - top)
    new = tl.math.exp2(m - top)
    return mn, lt * old + l * new, at * old[:, None] + a * new[:, None]


@triton.jit
def _halves(x, W: tl.constexpr):
    """[W, A, B] -> its first and its second half."""
    x = tl.reshape(x, [2, W // 2, x.shape[1], x.shape[2]])
    return tl.split(tl.permute(x, [1, 2, 3, 0]))


@triton.jit
def merge_run(mt, lt, at, m, l, a, W: tl.constexpr):
    """Merge W chunks (the leading axis), in order."""
    if W == 1:
        mt, lt, at = merge(
            mt, lt, at, tl.reshape(m, mt.shape), tl.reshape(l, lt.shape), tl.reshape(a, at.shape)
        )
    else:
        m0, m1 = _halves(m, W)
        l0, l1 = _halves(l, W)
        a0, a1 = _halves(a, W)
        mt, lt, at = merge_run(mt, lt, at, m0, l0, a0, W // 2)
        mt, lt, at = merge_run(mt, lt, at, m1, l1, a1, W // 2)
    return mt, lt, at
