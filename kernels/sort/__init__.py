"""The k largest or smallest elements along an axis, with their positions.

`values, indices = the first k of the elements in descending (or ascending) order`.

Bits: exact, nothing is computed. What is pinned is the order of elements that compare equal: the
one at the lower position comes first; -0 equals +0; NaN is larger than every number, as PyTorch
sorts. Elements are compared as integers (`key` in ``cpu.cpp`` and ``gpu.py``) together with their
positions, so that no two are equal and each way to select gives the same answer.

Row law: a row is ordered by itself. PyTorch's own op chooses its algorithm by the sizes, and with
it which of several equal elements it returns: half-precision scores of a router often are equal,
and the experts of a token would follow its neighbours.
"""

from bicompile.kernels.sort import op

__all__ = ["op"]
