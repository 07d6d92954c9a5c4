"""Triton device functions of attention: tiles, chunks and their merge (see `gpu`)."""

import triton
import triton.language as tl

from bicompile.kernels.common.trees import INTERPRET, LOG2E, pair_tree

LANES = tl.constexpr(32)  # pinned: partial sums of the weights of a row
SLICE = tl.constexpr(32)  # columns of the head in one fp32 dot


@triton.jit
def _tanh(x):
    """tanh; near 0 a polynomial, so that no digit is lost."""
    a, square = tl.abs(x), x * x
    q = tl.math.fma(square, -0.005897966679185629, 0.02079862542450428)
    q = tl.math.fma(square, q, -0.05378471687436104)
    q = tl.math.fma(square, q, 0.13331936299800873)
    q = tl.math.fma(square, q, -0.33333298563957214)
    small = tl.math.fma(q * square, x, x)
    two = tl.full(x.shape, 2.0, tl.float32)
    large = 1.0 - tl.div_rn(two, tl.math.exp2(a * (2.0 * LOG2E)) + 1.0)
    return tl.where(a < 0.6, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _fold(p, R: tl.constexpr, T: tl.constexpr):
    """[R, T] -> [R, LANES]: columns LANES apart, by halves (in the registers of a thread)."""
    for i in tl.static_range(5):
        if (T >> (i + 1)) >= LANES:
            p = tl.sum(tl.reshape(p, [R, 2, T >> (i + 1)]), 1)
    return p


@triton.jit
def _weigh(s, m, scale, HALF: tl.constexpr):
    """Weights of a tile of scores (unseen: -inf), new maximum, factor of what came before.

    For two-byte types the scale is part of one fma, as in the kernels of PyTorch; for fp32 the
    difference is exact. Exact no-op for a row that sees nothing here: the difference of the maxima
    comes before the scale, so the factor is 1.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    if HALF:
        p = tl.math.exp2(tl.math.fma(s, scale, -(top * scale)[:, None]))
    else:
        p = tl.math.exp2((s - top[:, None]) * scale)
    return p, m_new, tl.math.exp2((m - top) * scale)


@triton.jit
def _load(
    X, key0, low, top, stride, column_stride, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr
):
    """Rows key0 .. of K or V, [T, DP]; 0 where no row of this program sees anything."""
    d = tl.arange(0, DP)[None, :]
    key = key0 + tl.arange(0, T)[:, None]
    there = (key >= low) & (key <= top)
    if D != DP:
        there = there & (d < D)
    X += key0.to(tl.int64) * stride
    return tl.load(X + tl.arange(0, T)[:, None] * stride + d * column_stride, there, other=0.0)


@triton.jit
def _sliced_scores(
    q, sqd, K, key0, low, top, sks, skd, SIGN: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """q @ k.T in fp32, the head in slices: the same chain as a whole dot, in fewer registers."""
    s = tl.zeros([R, T], tl.float32)
    d = tl.arange(0, SLICE)[None, :]
    key = key0 + tl.arange(0, T)[:, None]
    there = (key >= low) & (key <= top)
    k = K + key0.to(tl.int64) * sks + tl.arange(0, T)[:, None] * sks
    for d0 in range(0, D, SLICE):
        x = tl.load(q[:, None] + (d0 + d) * sqd, mask=d0 + d < D, other=0.0)
        y = tl.load(k + (d0 + d) * skd, mask=there & (d0 + d < D), other=0.0)
        s = tl.dot(x * SIGN, y.T, s, input_precision="ieee")
    return s


@triton.jit
def opaque(x, PURE: tl.constexpr = True):
    """x (int32), through a move that the compiler does not look into; not PURE: it stays."""
    if not INTERPRET:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, PURE, 1)
    return x


@triton.jit
def _seen(x):
    """Whether the byte of a mask is set.

    Where an operand of a dot visibly derives from bytes, Triton takes a wider layout (kWidth 4), in
    which mma.sync meets the terms of K in another order, with other bits. A pure move would not
    hide them.
    """
    return opaque(x.to(tl.int32), False) != 0


@triton.jit
def _visible(
    s, key0, first, last, plain, MASK, sms, scale,
    T: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores with the mask applied (unseen: -inf), and what each row sees.

    A bias is divided by the scale, so that a row without one has the bits that it has elsewhere; in
    units of the exponent first, where the lowest finite number becomes -inf.
    """
    j = tl.arange(0, T)
    width = tl.maximum(last - first + 1, 0).to(tl.uint32)
    vis = ((key0 - first)[:, None] + j[None, :]).to(tl.uint32) < width[:, None]
    if MASKED:  # no branch: where the range of a row says it all, nothing is loaded
        at = (MASK + key0.to(tl.int64) * sms)[:, None] + j[None, :] * sms
        x = tl.load(at, mask=vis & (plain[:, None] < 1), other=0)
        if BIAS:
            x = x.to(tl.float32)
            vis = vis & (x != float("-inf"))
            s = s + x * LOG2E * (1.0 / scale)
        else:
            vis = vis & (_seen(x) | (plain[:, None] > 0))
    return tl.where(vis, s, float("-inf")), vis


@triton.jit
def _wild(
    acc, any, p, vis, V, key0, low, top, stride, column_stride, DV: tl.constexpr, T: tl.constexpr
):
    """acc with the infinite and NaN values of a tile, each added to the rows that see its key."""
    j = tl.arange(0, T)[None, :]
    d = tl.arange(0, acc.shape[1])
    for i in tl.range(0, tl.where(any, T, 0), num_stages=1):
        key = (key0 + i).to(tl.int64)
        columns = tl.where((key >= low) & (key <= top), DV, 0)
        x = tl.load(V + key * stride + d * column_stride, mask=d < columns, other=0.0)
        x = x.to(tl.float32)
        weight = tl.sum(tl.where(j == i, p.to(tl.float32), 0.0), 1)[:, None]  # one term: exact
        touched = tl.max(tl.where((j == i) & vis, 1, 0), 1)[:, None] > 0
        acc = tl.where(touched & (x - x != 0.0)[None, :], acc + weight * x[None, :], acc)
    return acc


@triton.jit
def _tile(
    key0, ends, partial, m, lanes, acc, mt, lt, at,
    q, K, V, KT, VT, MASK, first, last, plain, low, top, b, h,
    sqd, sks, skd, svs, svd, sms, scale, bend,
    SIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
    CAREFUL: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys key0 .. key0 + T - 1.

    `ends`: the chunk before (m, lanes, acc) is complete; it is merged into mt, lt, at.
    """
    if TMA:
        k = tl.reshape(KT.load([b, h, key0, 0]), [T, DP])
        v = tl.reshape(VT.load([b, h, key0, 0]), [T, DVP])
        s = tl.dot(q, k.T)
    elif q.dtype.is_ptr():
        s = _sliced_scores(q, sqd, K, key0, low, top, sks, skd, SIGN, D, R, T)
        v = _load(V, key0, low, top, svs, svd, DV, DVP, T)
    else:
        k = _load(K, key0, low, top, sks, skd, D, DP, T)
        v = _load(V, key0, low, top, svs, svd, DV, DVP, T)
        s = tl.dot(q, k.T)
    if CAP:
        s = _tanh(s * bend)
    if MASKED or CAREFUL:
        s, vis = _visible(s, key0, first, last, plain, MASK, sms, scale, T, MASKED, BIAS)
    elif partial:
        bound = opaque(last)
        s, _ = _visible(s, key0, first, bound, plain, MASK, sms, scale, T, False, False)
    if ends:
        mt, lt, at = merge(mt, lt, at, m, pair_tree(lanes, R, lanes.shape[1]), acc, scale)
        m = tl.full([R], float("-inf"), tl.float32)
        lanes, acc = tl.zeros(lanes.shape, tl.float32), tl.zeros(acc.shape, tl.float32)
    p, m, factor = _weigh(s, m, scale, v.dtype.primitive_bitwidth == 16)
    lanes = tl.math.fma(lanes, tl.broadcast_to(factor[:, None], lanes.shape), _fold(p, R, T))
    p = p.to(v.dtype)
    if CAREFUL:
        wild = (v - v) != 0.0
        v = tl.where(wild, 0.0, v).to(v.dtype)
    acc = tl.dot(p, v, acc * factor[:, None], input_precision="ieee")
    if CAREFUL:
        wild = tl.max(tl.max(wild.to(tl.int32), 1), 0) > 0
        acc = _wild(acc, wild, p, vis, V, key0, low, top, svs, svd, DV, T)
    return m, lanes, acc, mt, lt, at


@triton.jit
def attend(
    q, K, V, KT, VT, MASK, first, last, plain, b, h, anchor, t0, t1, c0, c1, head, full, low, top,
    sqd, sks, skd, svs, svd, sms, scale, bend,
    SIGN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, PER: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, CAREFUL: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of weights and weighted values over tiles [t0, t1) in chunks [c0, c1).

    One loop over all tiles: the loads of a chunk begin while the one before is still computed.
    MASKED: the ranges of the rows do not say all, the mask is read. CAREFUL: inf and NaN in V touch
    only the rows that see them; else they may turn a row that does not see them to NaN.
    """
    if K.dtype.element_ty != tl.float32:
        d = tl.arange(0, DP)[None, :]
        q = tl.load(q[:, None] + d * sqd, mask=d < D, other=0.0)
        if SIGN != 1:
            q = (q * SIGN).to(q.dtype)
    W: tl.constexpr = LANES if T > LANES else T
    mt = tl.full([R], float("-inf"), tl.float32)
    lt = tl.zeros([R], tl.float32)
    at = tl.zeros([R, DVP], tl.float32)
    m, lanes, acc = mt, tl.zeros([R, W], tl.float32), at
    first_tile = tl.maximum(t0, c0 * PER)
    for t in tl.range(first_tile, tl.minimum(t1, c1 * PER), num_stages=STAGES):
        key0 = anchor + t * T
        ends = False if SPLIT else (t % PER == 0) & (t > first_tile)
        m, lanes, acc, mt, lt, at = _tile(
            key0, ends, (t >= full) | (key0 < head), m, lanes, acc, mt, lt, at,
            q, K, V, KT, VT, MASK, first, last, plain, low, top, b, h,
            sqd, sks, skd, svs, svd, sms, scale, bend,
            SIGN, D, DV, DP, DVP, R, T, TMA, MASKED, BIAS, CAREFUL, CAP,
        )  # fmt: skip
    l = pair_tree(lanes, R, W)
    if SPLIT:
        mt, lt, at = m, l, acc
    else:
        mt, lt, at = merge(mt, lt, at, m, l, acc, scale)
    return mt, lt, at


@triton.jit
def merge(mt, lt, at, m, l, a, scale):
    """Join the next chunk to what came before; exact no-op when either saw nothing."""
    mn = tl.maximum(mt, m)
    top = tl.where(mn == float("-inf"), 0.0, mn)
    old = tl.math.exp2((mt - top) * scale)
    new = tl.math.exp2((m - top) * scale)
    at = tl.math.fma(a, tl.broadcast_to(new[:, None], a.shape), at * old[:, None])
    return mn, tl.math.fma(l, new, lt * old), at


@triton.jit
def with_sink(mt, lt, at, SINKS, head, here, scale):
    """The sum and the weighted values after a last chunk of one score and no value."""
    m = tl.load(SINKS + head, mask=here, other=0.0).to(tl.float32) * LOG2E * (1.0 / scale)
    _, l, a = merge(mt, lt, at, m, tl.full(lt.shape, 1.0, tl.float32), tl.zeros_like(at), scale)
    return l, a


@triton.jit
def _halves(x, W: tl.constexpr):
    """[W, A, B] -> its first and its second half."""
    x = tl.reshape(x, [2, W // 2, x.shape[1], x.shape[2]])
    return tl.split(tl.permute(x, [1, 2, 3, 0]))


@triton.jit
def merge_run(mt, lt, at, m, l, a, scale, W: tl.constexpr):
    """Merge W chunks (the leading axis), in order."""
    if W == 1:
        m, l, a = tl.reshape(m, mt.shape), tl.reshape(l, lt.shape), tl.reshape(a, at.shape)
        mt, lt, at = merge(mt, lt, at, m, l, a, scale)
    else:
        m0, m1 = _halves(m, W)
        l0, l1 = _halves(l, W)
        a0, a1 = _halves(a, W)
        mt, lt, at = merge_run(mt, lt, at, m0, l0, a0, scale, W // 2)
        mt, lt, at = merge_run(mt, lt, at, m1, l1, a1, scale, W // 2)
    return mt, lt, at


@triton.jit
def finish(l, a, OUT):
    """Divide and round; a row that saw no key is 0, and a zero is +0."""
    over = tl.where(l == 0.0, 0.0, tl.div_rn(1.0, l))
    over = tl.broadcast_to(over[:, None], a.shape)
    return tl.math.fma(a, over, tl.zeros(a.shape, tl.float32)).to(OUT.dtype.element_ty)
