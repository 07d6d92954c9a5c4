"""Sums of elements that an index sends to the same place: index_add, scatter_add, index_put.

`out[s, m] = self[s, m] + alpha * sum over k with index[k] = s of source[k, m]`.

Bits: in double, from self on in rising order of the position k in the source, and rounded once::

    acc = self[s, m]
    for k in range(K):
        if index[k] == s:
            acc = acc + alpha * source[k, m]

No atomics: positions are sorted by their target, stably, and each output walks its own list.

Row law: what an output element reads is the list of its sources, in order; elements that go
elsewhere, and how many there are of them, change no bit. Along m elements are independent.
"""

from bicompile.kernels.scatter import op

__all__ = ["op"]
