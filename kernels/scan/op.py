"""Ops of the scan family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "one chain in double along the axis (GPU: halves of runs of 32, runs of blocks of 1024)"


def cumsum_reference(self, dim, dtype):
    """`y[k]`: the sum of `x[0]` to `x[k]`."""
    return torch.cumsum(self, dim)


def cumprod_reference(self, dim, dtype):
    """`y[k]`: the product of `x[0]` to `x[k]`."""
    return torch.cumprod(self, dim)


def logcumsumexp_reference(self, dim, dtype):
    """`y[k]`: the logarithm of the sum of the exponentials of `x[0]` to `x[k]`."""
    return torch.logcumsumexp(self, dim)


def _fake(self, dim, dtype):
    return self.new_empty(self.shape, dtype=dtype)


_SCHEMA = "(Tensor self, int dim, ScalarType dtype) -> Tensor"
_CASES = (
    Case("self: M K -> M K", {"dim": 1, "dtype": None}),
    Case("self: K N -> K N", {"dim": 0, "dtype": None}),
    Case("self: M K N -> M K N", {"dim": 1, "dtype": None}),
    Case("self: M K -> M K", {"dim": 1, "dtype": torch.float32}),
)

cumsum = register(
    Kernel(
        name="cumsum",
        schema=_SCHEMA,
        contract=Contract(_CASES),
        reference=cumsum_reference,
        eager=lambda self, dim, dtype: torch.cumsum(self, dim, dtype=dtype),
        order=ORDER,
        fake=_fake,
    )
)

cumprod = register(
    Kernel(
        name="cumprod",
        schema=_SCHEMA,
        contract=Contract(_CASES),
        reference=cumprod_reference,
        eager=lambda self, dim, dtype: torch.cumprod(self, dim, dtype=dtype),
        order=ORDER,
        fake=_fake,
    )
)

logcumsumexp = register(
    Kernel(
        name="logcumsumexp",
        schema=_SCHEMA,
        contract=Contract(_CASES),
        reference=logcumsumexp_reference,
        eager=lambda self, dim, dtype: torch.logcumsumexp(self.to(dtype), dim),
        order=ORDER + " over pairs of maximum and sum",
        fake=_fake,
    )
)
