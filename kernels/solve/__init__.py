"""Systems of equations with a triangular matrix.

`solve_triangular`: X with `A @ X = B`, where A is lower (or upper) triangular; what lies on the
other side of the diagonal is not read, nor the diagonal itself if it is all 1 (`unitriangular`).

Bits: forward substitution in double, one chain for each element, in the order in which the elements
before it are found; rounded once, at the end::

    for i in range(K):              # from the last one on, if A is upper
        acc = B[i]
        for j in range(i):
            acc = acc - A[i, j] * X[j]
        X[i] = acc / A[i, i]

On a CPU and on a GPU these are the same numbers.

Row law: a column of X reads its matrix and its column of B alone.
"""

from bicompile.kernels.solve import op

__all__ = ["op"]
