"""The op of the solve family: shapes, reference and contract."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register


def solve_triangular_reference(A, B, upper, unitriangular):
    """`torch.linalg.solve_triangular`."""
    return torch.linalg.solve_triangular(A, B, upper=upper, unitriangular=unitriangular)


def _in_float32(A, B, upper, unitriangular):
    """PyTorch has no half types here."""
    return solve_triangular_reference(A.float(), B.float(), upper, unitriangular).to(B.dtype)


_CASES = tuple(
    Case("A: B K K, B: B K N -> B K N", {"upper": upper, "unitriangular": unit})
    for upper in (False, True)
    for unit in (False, True)
)

solve_triangular = register(
    Kernel(
        name="solve_triangular",
        schema="(Tensor A, Tensor B, bool upper, bool unitriangular) -> Tensor",
        contract=Contract(_CASES),
        reference=solve_triangular_reference,
        eager=_in_float32,
        order="one chain in double along the elements found before",
    )
)
