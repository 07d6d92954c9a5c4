"""Ops of the softmax family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "exact maximum; sum of exp(x - max) in the lanes of the reduce family"


def softmax_reference(self, dim, dtype):
    """`exp(x) / sum(exp(x))`."""
    return torch.softmax(self, dim)


def softmax_statistics_reference(self, dim):
    """The maximum, and `log(sum(exp(x - max)))`."""
    top = self.amax(dim, True)
    return top, (self - top).exp().sum(dim, True).log()


def softmax_backward_reference(grad, output, dim, dtype):
    """`(grad - sum(grad * output)) * output`."""
    return (grad - (grad * output).sum(dim, keepdim=True)) * output


def _fake(self, dim, dtype):
    return self.new_empty(self.shape, dtype=dtype)


def _fake_backward(grad, output, dim, dtype):
    return _fake(grad, dim, dtype)


def _fake_statistics(self, dim):
    shape = [1 if d == dim else n for d, n in enumerate(self.shape)]
    return tuple(self.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _eager_backward(grad, output, dim, dtype):
    # PyTorch computes a half gradient with respect to float32 in float32, and rounds then.
    op = torch.ops.aten._softmax_backward_data
    return op(grad, output, dim, grad.dtype).to(dtype)


_CASES = (
    Case("self: M K -> M K", {"dim": 1, "dtype": None}),
    Case("self: K N -> K N", {"dim": 0, "dtype": None}),
    Case("self: M K N -> M K N", {"dim": 1, "dtype": None}),
    Case("self: M K -> M K", {"dim": 1, "dtype": torch.float32}),
)

softmax = register(
    Kernel(
        name="softmax",
        schema="(Tensor self, int dim, ScalarType dtype) -> Tensor",
        contract=Contract(_CASES),
        reference=softmax_reference,
        eager=lambda self, dim, dtype: torch.softmax(self, dim, dtype=dtype),
        order=ORDER + "; one division",
        fake=_fake,
    )
)

softmax_statistics = register(
    Kernel(
        name="softmax_statistics",
        schema="(Tensor self, int dim) -> (Tensor, Tensor)",
        contract=Contract(
            (
                Case("self: M K -> M 1, M 1", {"dim": 1}),
                Case("self: K N -> 1 N, 1 N", {"dim": 0}),
                Case("self: M K N -> M 1 N, M 1 N", {"dim": 1}),
            )
        ),
        reference=softmax_statistics_reference,
        eager=lambda self, dim: softmax_statistics_reference(self.float(), dim),
        order=ORDER + "; its logarithm",
        fake=_fake_statistics,
    )
)

softmax_backward = register(
    Kernel(
        name="softmax_backward",
        schema="(Tensor grad, Tensor output, int dim, ScalarType dtype) -> Tensor",
        contract=Contract(
            (
                Case("grad: M K, output: M K -> M K", {"dim": 1, "dtype": None}),
                Case("grad: K N, output: K N -> K N", {"dim": 0, "dtype": None}),
                Case("grad: M K N, output: M K N -> M K N", {"dim": 1, "dtype": None}),
            )
        ),
        reference=softmax_backward_reference,
        eager=_eager_backward,
        order="sum of grad * output in the lanes of the reduce family; (grad - sum) * output",
        fake=_fake_backward,
    )
)
