"""Ops of the sort family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register


def topk_reference(self, k, dim, largest):
    """The first `k` of a stable sort along `dim`."""
    values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _fake(self, k, dim, largest):
    shape = list(self.shape)
    if shape:
        shape[dim] = k
    return self.new_empty(shape), self.new_empty(shape, dtype=torch.int64)


def _at_most(count):
    return lambda sizes: min(count, sizes["K"])


_CASES = (
    Case("self: M K -> M T, M T", {"k": _at_most(8), "dim": 1, "largest": True}),
    Case("self: M K -> M T, M T", {"k": _at_most(2), "dim": 1, "largest": False}),
    Case("self: K N -> T N, T N", {"k": _at_most(1 << 20), "dim": 0, "largest": True}),
)

topk = register(
    Kernel(
        name="topk",
        schema="(Tensor self, SymInt k, int dim, bool largest) -> (Tensor, Tensor)",
        contract=Contract(_CASES),
        reference=topk_reference,
        eager=lambda self, k, dim, largest: torch.topk(self, k, dim, largest),
        order="exact; of equal elements the one at the lowest position comes first, NaN is largest",
        fake=_fake,
    )
)
