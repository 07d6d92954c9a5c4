"""Ops of the reduce family: shapes, references and contracts."""

from __future__ import annotations

import math

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "element k goes to lane k mod 16 (GPU: 256), each lane in rising k, then a tree of halves"


def reduced_shape(shape, dim, keepdim):
    """The shape after a reduction over `dim` (sorted, non-negative)."""
    if keepdim:
        return [1 if i in dim else s for i, s in enumerate(shape)]
    return [s for i, s in enumerate(shape) if i not in dim]


def sum_reference(self, dim, keepdim, dtype):
    """Sum over `dim`."""
    return self.sum(dim, keepdim)


def mean_reference(self, dim, keepdim, dtype):
    """Sum over `dim` divided by the number of elements."""
    return self.mean(dim, keepdim)


def prod_reference(self, dim, keepdim, dtype):
    """Product over `dim`."""
    for d in reversed(dim):
        self = self.prod(d, keepdim)
    return self


def var_reference(self, dim, correction, keepdim):
    """Mean of the squared distances from the mean, over K - correction."""
    return self.var(dim, correction=correction, keepdim=keepdim)


def std_reference(self, dim, correction, keepdim):
    """Square root of the variance."""
    return self.std(dim, correction=correction, keepdim=keepdim)


def var_mean_reference(self, dim, correction, keepdim):
    """Variance and mean."""
    return torch.var_mean(self, dim, correction=correction, keepdim=keepdim)


def logsumexp_reference(self, dim, keepdim):
    """Logarithm of the sum of the exponentials."""
    return self.logsumexp(dim, keepdim)


def norm_reference(self, p, dim, keepdim, dtype):
    """p-norm over `dim`."""
    return torch.linalg.vector_norm(self, p, dim, keepdim)


def _fake(self, dim, keepdim, dtype):
    return self.new_empty(reduced_shape(self.shape, dim, keepdim), dtype=dtype)


def _fake_var(self, dim, correction, keepdim):
    return self.new_empty(reduced_shape(self.shape, dim, keepdim))


def _fake_var_mean(self, dim, correction, keepdim):
    return _fake_var(self, dim, correction, keepdim), _fake_var(self, dim, correction, keepdim)


def _fake_logsumexp(self, dim, keepdim):
    return self.new_empty(reduced_shape(self.shape, dim, keepdim))


def _fake_norm(self, p, dim, keepdim, dtype):
    return self.new_empty(reduced_shape(self.shape, dim, keepdim), dtype=dtype)


def _cases(**params):
    """Last axis, first axis, a middle axis, several axes kept."""
    return (
        Case("self: M K -> M", {"dim": [1], "keepdim": False, **params}),
        Case("self: K N -> N", {"dim": [0], "keepdim": False, **params}),
        Case("self: M K N -> M N", {"dim": [1], "keepdim": False, **params}),
        Case("self: B K1 M K2 -> B M", {"dim": [1, 3], "keepdim": False, **params}),
    )


_DTYPE_SCHEMA = "(Tensor self, int[] dim, bool keepdim, ScalarType dtype) -> Tensor"
_VAR_SCHEMA = "(Tensor self, int[] dim, float correction, bool keepdim) -> "

sum = register(
    Kernel(
        name="sum",
        schema=_DTYPE_SCHEMA,
        contract=Contract((*_cases(dtype=None), *_cases(dtype=torch.float32)[:1])),
        reference=sum_reference,
        eager=lambda self, dim, keepdim, dtype: torch.sum(self, dim, keepdim, dtype=dtype),
        order=ORDER,
        fake=_fake,
    )
)

mean = register(
    Kernel(
        name="mean",
        schema=_DTYPE_SCHEMA,
        contract=Contract((*_cases(dtype=None), *_cases(dtype=torch.float32)[:1])),
        reference=mean_reference,
        eager=lambda self, dim, keepdim, dtype: torch.mean(self, dim, keepdim, dtype=dtype),
        order=ORDER + "; divided by K",
        fake=_fake,
    )
)

prod = register(
    Kernel(
        name="prod",
        schema=_DTYPE_SCHEMA,
        contract=Contract(_cases(dtype=None)),
        reference=prod_reference,
        eager=prod_reference,
        order=ORDER,
        fake=_fake,
    )
)

var = register(
    Kernel(
        name="var",
        schema=_VAR_SCHEMA + "Tensor",
        contract=Contract((*_cases(correction=1.0), *_cases(correction=0.0)[:1])),
        reference=var_reference,
        eager=var_reference,
        order="two passes: the mean, then the squared distances; " + ORDER,
        fake=_fake_var,
    )
)

std = register(
    Kernel(
        name="std",
        schema=_VAR_SCHEMA + "Tensor",
        contract=Contract(_cases(correction=1.0)),
        reference=std_reference,
        eager=std_reference,
        order="square root of var, before rounding; " + ORDER,
        fake=_fake_var,
    )
)

var_mean = register(
    Kernel(
        name="var_mean",
        schema=_VAR_SCHEMA + "(Tensor, Tensor)",
        contract=Contract(
            (Case("self: M K -> M, M", {"dim": [1], "correction": 1.0, "keepdim": False}),)
        ),
        reference=var_mean_reference,
        eager=var_mean_reference,
        order="as var and mean",
        fake=_fake_var_mean,
    )
)

logsumexp = register(
    Kernel(
        name="logsumexp",
        schema="(Tensor self, int[] dim, bool keepdim) -> Tensor",
        contract=Contract(_cases()),
        reference=logsumexp_reference,
        eager=logsumexp_reference,
        order="exact maximum, sum of exp(x - max), log, + max; " + ORDER,
        fake=_fake_logsumexp,
    )
)

norm = register(
    Kernel(
        name="norm",
        schema="(Tensor self, float p, int[] dim, bool keepdim, ScalarType dtype) -> Tensor",
        contract=Contract(
            (
                *_cases(p=2.0, dtype=None),
                *(_cases(p=p, dtype=None)[0] for p in (0.0, 1.0, 3.0, math.inf, -math.inf)),
            )
        ),
        reference=norm_reference,
        eager=lambda self, p, dim, keepdim, dtype: torch.linalg.vector_norm(
            self, p, dim, keepdim, dtype=dtype
        ),
        order="sum of |x| ** p, then the root; " + ORDER,
        fake=_fake_norm,
    )
)
