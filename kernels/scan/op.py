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


# -------------------------------------------------------------------------------------- gradient

NEAR = 40.0  # pinned: powers of e between which products lose nothing


def _save(ctx, inputs, output):
    self, ctx.dim, _ = inputs
    ctx.save_for_backward(self, output)


def _backward(ctx, grad):
    """Element j's: the sum of `grad[k] * exp(x[j] - y[k])` over k >= j.

    A running sum of `grad[k] * exp(y[-1] - y[k])` from the end, which rounds numbers of the size of
    the result.  PyTorch's formula adds in logarithms, whose rounding is that of the size of y; here
    it serves where y is so far below its last element that the powers might overflow.
    """
    x, y, grad = (t.float() for t in (*ctx.saved_tensors, grad))
    dim = ctx.dim
    last = y.narrow(dim, -1, 1) if y.shape[dim] else y
    terms = (grad * (last - y).exp()).flip(dim)
    sums = cumsum.op(terms, dim, torch.float32).flip(dim)
    near = sums * (y - last).exp() * (x - y).exp()
    lowest = torch.finfo(torch.float32).min
    logs = grad.abs().log()
    positive, negative = (
        logcumsumexp.op((torch.where(some, logs, lowest) - y).flip(dim), dim, torch.float32)
        for some in (grad > 0, grad < 0)
    )
    far = (positive.flip(dim) + x).exp() - (negative.flip(dim) + x).exp()
    found = torch.where(y > last - NEAR, near, far)
    return found.to(ctx.saved_tensors[0].dtype), None, None


torch.library.register_autograd("bicompile::logcumsumexp", _backward, setup_context=_save)
