"""Scaled dot product attention: sdpa.

`softmax(query @ key.T * scale + mask) @ value`; groups of query heads may share a key head.  With
a `softcap`, scores are bent by `softcap * tanh(score / softcap)` before the mask (Gemma 2); `sinks`
are a score of each head that takes part in the sum of the weights without a value (gpt-oss).

Bits: on the CPU, for one row (a query of one head), float32::

    s[j] = fma chain over even d + fma chain over odd d, * scale, capped, + mask
    p[j] = exp(s[j] - max(s))                        # the maximum is exact; masked keys: 0
    for j in range(S):                               # one chain each, from key 0 upwards
        sum = sum + p[j]
        o = fma(p[j], value[j], o)
    sum = sum + exp(sink - max)                      # with sinks; the maximum is also over them
    out = o / sum + 0.0                              # rounded once; no key seen: 0

Adding 0 * value changes no chain, so masked keys before, between or behind the seen ones change no
bit; where their values are NaN or infinite the row is taken again without them.

On a GPU: chunks of 512 keys counted from the first that the row sees, merged in order; a chunk is
an online softmax over tiles of 64 keys (fp32: 32)::

    m' = max(m, s)                               # exact; s: the dot, unscaled; masked keys: -inf
    p[j] = 2 ** fma(s[j], c, -(m' * c))          # c = scale * log2(e); fp32: 2 ** ((s[j] - m') * c)
    f = 2 ** ((m - m') * c)                      # exactly 1 where the maximum stays
    sum[i] = fma(sum[i], f, p[i] + p[i + 32])    # 32 sums, joined by a tree of neighbours
    o = o * f + p @ value                        # p rounded to the type of the values

and two chunks are joined by the same factors; a sink is a last chunk of one key.  With a cap, s is
tanh(s * scale / softcap) and c = softcap * log2(e).  A tile that a row does not see is f = 1 and
p = 0.

A mask of integers says which key of its row each key is, from 1 (0: not seen).  Chunks are then
counted from key 1, whether it is there or has left the cache: so the keys of a window that rolls
are added in the order in which the whole prompt adds them.

Row law: a row reads its query and the keys and values it sees; no number of queries, length of a
cache, block of rows or thread takes part.
"""

from bicompile.kernels.attention import op

__all__ = ["op"]
