"""The gradient of scaled dot product attention: sdpa_backward.

Of the forward nothing but its inputs is kept; scores are computed again.  With `p` the weights
divided by their sum, and `g` the gradient of the output::

    t[j] = g @ value[j]                              # as a score
    ds[j] = p[j] * (t[j] - sum(p * t)) * scale
    dquery = sum over keys of ds[j] * key[j]
    dkey[j] = sum over rows of ds[j] * query
    dvalue[j] = sum over rows of p[j] * g

Bits: on the CPU t is two fma chains, as a score is; `sum(p * t)` is one chain over the keys, in
double; the others are one chain each, from key 0 upwards, and over queries that rise, the heads
that share a key head innermost (float32: in double, rounded once).

On a GPU the chains are dots over tiles: of keys, counted from the first seen one; and for each head
of a group in turn of queries, counted from the first.  p and ds are rounded to the type of the
inputs, and the scale is multiplied at the end.  In float32 the dots run over a tile first, then
over the tiles, the heads of a group innermost.

Row law: the gradient of a query reads its row, and the keys and values that it sees.  The gradients
of a key and a value read the queries of their own batch row; queries that do not see them, and keys
elsewhere, change no bit.  Sinks, a cap and masks that are learnt have no gradient yet:
`UnsupportedGradient`.
"""

from bicompile.kernels.attention_backward import op

__all__ = ["op"]
