"""Triton device functions of attention: tiles, chunks and their merge (see `gpu`)."""

import triton
import triton.language as tl

from bicompile.kernels.common.trees import INTERPRET, LOG2E

ONES = tl.constexpr(16)  # columns of ones that sum the weights: what a dot needs at least
SLICE = tl.constexpr(32)  # columns of the head in one fp32 dot


@triton.jit
def _weigh(s, m, TYPE: tl.constexpr):
    """Weights of a tile of logits (base 2; unseen: -inf), new maximum, factor of what came before.

    The weights are rounded to the type of the values, and summed as they are multiplied. Exact
    no-op for a row that sees nothing here: the difference comes first, so the factor is 1.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(s - top[:, None]).to(TYPE)
    return p, m_new, tl.math.exp2(m - top)[:, None]


@triton.jit
def _load(
    X, key0, there, stride, column_stride, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr
):
    """Rows key0 .. of K or V, [T, DP]; 0 where there is nothing to see."""
    d = tl.arange(0, DP)
    at = tl.arange(0, T)[:, None] * stride + d[None, :] * column_stride
    X += key0.to(tl.int64) * stride
    return tl.load(X + at, mask=there[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _load_full(X, key0, stride, column_stride, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr):
    """The same for a tile that is seen whole."""
    d = tl.arange(0, DP)
    at = tl.arange(0, T)[:, None] * stride + d[None, :] * column_stride
    X += key0.to(tl.int64) * stride
    if D == DP:
        x = tl.load(X + at)
    else:
        x = tl.load(X + at, mask=d[None, :] < D, other=0.0)
    return x


@triton.jit
def _sliced_scores(
    q, sqd, K, key0, there, sks, skd, D: tl.constexpr, R: tl.constexpr, T: tl.constexpr
):
    """q @ k.T in fp32, the head in slices: the same chain as a whole dot, in fewer registers."""
    s = tl.zeros([R, T], tl.float32)
    d = tl.arange(0, SLICE)
    k = K + key0.to(tl.int64) * sks + tl.arange(0, T)[:, None] * sks
    for d0 in range(0, D, SLICE):
        inside = (d0 + d < D)[None, :]
        x = tl.load(q[:, None] + (d0 + d)[None, :] * sqd, mask=inside, other=0.0)
        y = tl.load(k + (d0 + d)[None, :] * skd, mask=there[:, None] & inside, other=0.0)
        s = tl.dot(x, y.T, s, input_precision="ieee")
    return s


@triton.jit
def _add(p, v, acc):
    """acc + p @ v: one chain over the keys of the tile."""
    return tl.dot(p, v, acc, input_precision="ieee")


@triton.jit
def _add_weights(p, total):
    """total + sum(p): a dot with ones, whose order is that of every dot; all columns are equal."""
    return _add(p, tl.full([p.shape[1], ONES], 1.0, p.dtype), total)


@triton.jit
def _special(p, vis, v):
    """What inf and NaN values add to the rows that see them, [R, DVP]; 0: nothing.

    As p @ v: inf times a weight of 0 is NaN. Counts are exact in any order: a key adds 1 for +inf,
    128 for -inf, 16384 or more for NaN; a tile has at most 64 keys.
    """
    x = v.to(tl.float32)
    code = tl.where(x == float("inf"), 1.0, tl.where(x == float("-inf"), 128.0, 16384.0))
    code = tl.where((x - x) != 0.0, code, 0.0).to(v.dtype)
    w = p.to(tl.float32)
    touch = tl.where(w > 0.0, 1.0, tl.where(w == 0.0, 16384.0, 0.0))
    touch = tl.where(vis, touch, 0.0)
    # A gather of everything in its place: Triton 3.6 would else hand `vis` to the dot as an operand
    # of single bits, which it cannot lower.
    place = tl.broadcast_to(tl.arange(0, p.shape[1])[None, :], p.shape)
    touch = tl.gather(touch, place, 1).to(v.dtype)
    n = _add(touch, code, tl.zeros([p.shape[0], v.shape[1]], tl.float32))
    extra = tl.where(n - tl.floor(n / 128.0) * 128.0 > 0.0, float("inf"), 0.0)
    extra = extra + tl.where(n >= 128.0, float("-inf"), 0.0)
    return tl.where(n >= 16384.0, float("nan"), extra)


@triton.jit
def _seen(x):
    """Whether the byte of a mask is set.

    Through an opaque move: where an operand of a dot derives from bytes, Triton takes a wider
    layout (kWidth 4), in which mma.sync meets the terms of K in another order, with other bits.
    """
    x = x.to(tl.int32)
    if not INTERPRET:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, False, 1)
    return x != 0


@triton.jit
def _visible(
    s, key0, first, last, plain, MASK, sms,
    T: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Logits with the mask applied (unseen: -inf), and what each row sees."""
    j = tl.arange(0, T)
    key = key0 + j
    vis = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
    if MASKED:  # no branch: where the range of a row says it all, nothing is loaded
        at = (MASK + key0.to(tl.int64) * sms)[:, None] + j[None, :] * sms
        x = tl.load(at, mask=vis & (plain[:, None] < 1), other=0)
        if BIAS:
            x = x.to(tl.float32)
            vis = vis & (x != float("-inf"))
            s = s + x * LOG2E
        else:
            vis = vis & (_seen(x) | (plain[:, None] > 0))
    return tl.where(vis, s, float("-inf")), vis


@triton.jit
def _scores(
    q, sqd, K, key0, there, sks, skd, scale,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Logits of a tile. q: the queries [R, DP]; in fp32 their addresses [R]."""
    if q.dtype.is_ptr():
        s = _sliced_scores(q, sqd, K, key0, there, sks, skd, D, R, T)
    else:
        s = tl.dot(q, _load(K, key0, there, sks, skd, D, DP, T).T)
    return s * scale


@triton.jit
def _partial_tile(
    t, m, total, acc, q, K, V, MASK, first, last, plain, low, top, anchor,
    sqd, sks, skd, svs, svd, sms, scale,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of which some row sees only a part. What a row does not see adds nothing to it."""
    key0 = anchor + t * T
    there = (key0 + tl.arange(0, T) >= low) & (key0 + tl.arange(0, T) <= top)
    s = _scores(q, sqd, K, key0, there, sks, skd, scale, D, DP, R, T)
    s, vis = _visible(s, key0, first, last, plain, MASK, sms, T, MASKED, BIAS)
    v = _load(V, key0, there, svs, svd, DV, DVP, T)
    p, m, factor = _weigh(s, m, v.dtype)
    total = _add_weights(p, total * factor)
    bad = (v - v) != 0.0  # inf and NaN: as 0 here, then what they are to the rows that see them
    acc = _add(p, tl.where(bad, 0.0, v).to(v.dtype), acc * factor)
    if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
        acc = acc + _special(p, vis, _load(V, key0, there, svs, svd, DV, DVP, T))
    return m, total, acc


@triton.jit
def attend_chunk(
    q, K, V, MASK, first, last, plain, low, top, anchor, lo, mid, hi, ranged,
    sqd, sks, skd, svs, svd, sms, scale,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of weights and weighted values over tiles [lo, hi) of a chunk.

    Every row sees tiles [lo, mid) whole. Of the rest the ranges say all where `ranged`; else the
    mask is read. (Loops of their own: what is not needed is not even fetched as code.)
    """
    m = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R, ONES], tl.float32)
    acc = tl.zeros([R, DVP], tl.float32)
    for t in tl.range(lo, mid, num_stages=STAGES):
        key0 = anchor + t * T
        if q.dtype.is_ptr():
            there = tl.full([T], 1, tl.int1)
            s = _sliced_scores(q, sqd, K, key0, there, sks, skd, D, R, T) * scale
        else:
            s = tl.dot(q, _load_full(K, key0, sks, skd, D, DP, T).T) * scale
        v = _load_full(V, key0, svs, svd, DV, DVP, T)
        p, m, factor = _weigh(s, m, v.dtype)
        total = _add_weights(p, total * factor)
        acc = _add(p, v, acc * factor)
    edge = tl.where(ranged, hi, mid)
    for t in tl.range(mid, edge, num_stages=1):
        m, total, acc = _partial_tile(
            t, m, total, acc, q, K, V, MASK, first, last, plain, low, top, anchor,
            sqd, sks, skd, svs, svd, sms, scale, D, DV, DP, DVP, R, T, False, False,
        )  # fmt: skip
    if MASKED:
        for t in tl.range(edge, hi, num_stages=1):
            m, total, acc = _partial_tile(
                t, m, total, acc, q, K, V, MASK, first, last, plain, low, top, anchor,
                sqd, sks, skd, svs, svd, sms, scale, D, DV, DP, DVP, R, T, True, BIAS,
            )  # fmt: skip
    return m, tl.max(total, 1), acc


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
