"""Triton device functions of attention's gradient: what one tile adds (see `gpu`)."""

import triton
import triton.language as tl

from bicompile.kernels.attention.masks import NO_KEY
from bicompile.kernels.attention.tiles import _fold, _seen
from bicompile.kernels.common.trees import LOG2E


@triton.jit
def load_rows(X, n, there, stride, column_stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows n of a matrix, [N, DP]; what is not there is 0."""
    d = tl.arange(0, DP)[None, :]
    if D != DP:
        there = there & (d < D)
    return tl.load(X + n.to(tl.int64)[:, None] * stride + d * column_stride, there, other=0.0)


@triton.jit
def _finite(x, EDGE: tl.constexpr):
    """x without NaN and inf: the other operand is NaN already where they are seen."""
    if EDGE:
        x = tl.where(x - x == 0.0, x, 0.0).to(x.dtype)
    return x


@triton.jit
def _visible(
    x, key, first, last, MASK, sms, MASKED: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr
):
    """Scores in units of log2, -inf where a key is not seen, and which are seen.

    Queries see keys `first` to `last`; MASKED: those of them that the mask shows.  One of query and
    key is a column, the other a row; MASK has the shape of the query.  Not EDGE: all keys of the
    tile are seen.
    """
    vis = (key >= first) & (key <= last)
    if EDGE:
        if MASKED:
            m = tl.load(MASK + key.to(tl.int64) * sms, mask=vis, other=0)
            if BIAS:
                m = m.to(tl.float32)
                vis = vis & (m != float("-inf"))
                x = x + m * LOG2E
            else:
                vis = vis & _seen(m)
        x = tl.where(vis, x, float("-inf"))
    return x, vis


@triton.jit
def _weights(x, top, vis, EDGE: tl.constexpr):
    """Weights divided by their sum, by way of its logarithm, which `top` has."""
    p = tl.math.exp2(x - top)
    if EDGE:
        p = tl.where(vis, p, 0.0)
    return p


@triton.jit
def scores(
    q, g, key0, K, V, S, first, last, MASK, sks, skd, svs, svd, sms, slope,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A tile of keys, its scores, which of them are seen, and the gradients of the weights."""
    key = key0 + tl.arange(0, BN)
    there = (key >= 0) & (key < S) if EDGE else key >= key0
    k = load_rows(K, key, there[:, None], sks, skd, D, DP)
    v = load_rows(V, key, there[:, None], svs, svd, DV, DVP)
    x, vis = _visible(
        tl.dot(q, k.T) * slope, key[None, :], first[:, None], last[:, None], MASK, sms,
        MASKED, BIAS, EDGE,
    )  # fmt: skip
    return k, x, vis, tl.dot(g, v.T)


@triton.jit
def add_weights(m, sums, dots, x, vis, dp, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr):
    """The maximum, the sums of weights and of weight times gradient after one more tile of keys."""
    m_new = tl.maximum(m, tl.max(x, 1))
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.math.exp2(x - top[:, None])
    factor = tl.math.exp2(m - top)[:, None]
    product = p * dp
    if EDGE:
        product = tl.where(vis, product, 0.0)
    return m_new, sums * factor + _fold(p, BM, BN), dots * factor + _fold(product, BM, BN)


@triton.jit
def add_keys(acc, k, x, vis, dp, top, dot, EDGE: tl.constexpr):
    """The gradient of queries after one more tile of keys."""
    ds = _weights(x, top, vis, EDGE) * (dp - dot)
    if EDGE:
        ds = tl.where(vis, ds, 0.0)
    return tl.dot(ds.to(k.dtype), _finite(k, EDGE), acc)


@triton.jit
def add_queries(
    dk, dv, k, v, row, Q, GRAD, Q_LEN, S, key, VISIBLE, rq, TOP, DOT, MASK,
    sqm, sqd, sgm, sgd, smq, sms, slope,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
    MODE: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values after one more tile of queries."""
    query = row + tl.arange(0, BM)
    here = query < Q_LEN if EDGE else query >= row
    q = load_rows(Q, query, here[:, None], sqm, sqd, D, DP)
    g = load_rows(GRAD, query, here[:, None], sgm, sgd, DV, DVP)
    top = tl.load(TOP + query, mask=here, other=0.0)[None, :]
    dot = tl.load(DOT + query, mask=here, other=0.0)[None, :]
    mask = MASK + query.to(tl.int64)[None, :] * smq
    first = tl.zeros([BM], tl.int32)
    last = tl.where(here, S - 1, -1)
    if MODE == "causal":
        last = tl.minimum(last, query)
    elif MODE == "mask" and EDGE:
        first = tl.load(VISIBLE + query * rq, mask=here, other=NO_KEY)
        last = tl.load(VISIBLE + query * rq + 1, mask=here, other=-1)
    x, vis = _visible(
        tl.dot(k, q.T) * slope, key[:, None], first[None, :], last[None, :], mask, sms,
        MASKED, BIAS, EDGE,
    )  # fmt: skip
    p = _weights(x, top, vis, EDGE)
    ds = p * (tl.dot(v, g.T) - dot)
    if EDGE:
        ds = tl.where(vis, ds, 0.0)
        wild = tl.max((g - g != 0.0).to(tl.int32), 1) > 0
        p = tl.where(vis & wild[None, :], float("nan"), p)
    dv = tl.dot(p.to(g.dtype), _finite(g, EDGE), dv)
    dk = tl.dot(ds.to(q.dtype), _finite(q, EDGE), dk)
    return dk, dv
