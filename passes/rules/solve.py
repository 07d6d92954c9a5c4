"""Systems of equations with a triangular matrix."""

from __future__ import annotations

import torch

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, size


def _solve_triangular(emit, A, B, *, upper, left=True, unitriangular=False):
    shapes = [[*value(t).shape] for t in (A, B)]
    if value(A).dtype is not torch.float32 or any(isinstance(n, int) and n == 0 for n in shapes[1]):
        return NotImplemented
    if shapes[0][:-2] != shapes[1][:-2]:
        batch = list(torch.broadcast_shapes(shapes[0][:-2], shapes[1][:-2]))
        if not all(isinstance(n, int) for n in batch):
            return NotImplemented
        A, B = (emit(aten.expand.default, t, [*batch, -1, -1]) for t in (A, B))
    if not left:  # X @ A = B is A.mT @ X.mT = B.mT
        A, B = (emit(aten.transpose.int, t, -2, -1) for t in (A, B))
        upper = not upper
    shape = [size(emit, B, d, n) for d, n in enumerate(value(B).shape)]
    if len(shape) != 3:
        A = emit(aten.reshape.default, A, [-1, shape[-2], shape[-2]])
        B = emit(aten.reshape.default, B, [-1, *shape[-2:]])
    found = emit(KERNELS["solve_triangular"].op, A, B, upper, unitriangular)
    if len(shape) != 3:
        found = emit(aten.reshape.default, found, shape)
    return found if left else emit(aten.transpose.int, found, -2, -1)


RULES = ((aten.linalg_solve_triangular.default, "solve_triangular", _solve_triangular),)
