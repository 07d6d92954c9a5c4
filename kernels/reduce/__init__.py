"""Reductions over any axes: sum, mean, prod, var, std, var_mean, logsumexp, norm.

The K elements of an output are taken in row-major order of the reduced axes.

Bits: on the CPU, in double, rounded once at the end::

    lane = [identity] * 16
    for k in range(K):
        lane[k % 16] = step(lane[k % 16], x[k])
    for w in (8, 4, 2, 1):
        lane = [join(lane[i], lane[i + w]) for i in range(w)]

var steps by (x - mean)^2 after a pass for the mean, logsumexp by exp(x - max).  On a GPU: 256 lanes
and the same tree.

Row law: an output reads its own K elements in an order that K alone sets.  Where the reduced axis
is strided, 16 neighbouring outputs are computed side by side, each by this loop.
"""

from bicompile.kernels.reduce import op

__all__ = ["op"]
