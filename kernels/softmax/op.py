"""Ops of the softmax family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "exact maximum; sum of exp(x - max) in the lanes of the reduce family"


def softmax_reference(self, dim, dtype):
    """`exp(x) / sum(exp(x))`."""
    return torch.softmax(self, dim)


def log_softmax_reference(self, dim, dtype):
    """`x - log(sum(exp(x)))`."""
    return torch.log_softmax(self, dim)


def log_softmax_gather_reference(self, dim, index, dtype):
    """The elements of `log_softmax` that `index` names, as `torch.gather` does."""
    return torch.log_softmax(self, dim).gather(dim, index)


def softmax_backward_reference(grad, output, dim, dtype):
    """`(grad - sum(grad * output)) * output`."""
    return (grad - (grad * output).sum(dim, keepdim=True)) * output


def log_softmax_backward_reference(grad, output, dim, dtype):
    """`grad - exp(output) * sum(grad)`."""
    return grad - output.exp() * grad.sum(dim, keepdim=True)


def _fake(self, dim, dtype):
    return self.new_empty(self.shape, dtype=dtype)


def _fake_backward(grad, output, dim, dtype):
    return _fake(grad, dim, dtype)


def _eager_backward(op):
    def eager(grad, output, dim, dtype):
        # PyTorch computes a half gradient with respect to float32 in float32, and rounds then.
        return op(grad, output, dim, grad.dtype).to(dtype)

    return eager


_SCHEMA = "(Tensor self, int dim, ScalarType dtype) -> Tensor"
_CASES = (
    Case("self: M K -> M K", {"dim": 1, "dtype": None}),
    Case("self: K N -> K N", {"dim": 0, "dtype": None}),
    Case("self: M K N -> M K N", {"dim": 1, "dtype": None}),
    Case("self: M K -> M K", {"dim": 1, "dtype": torch.float32}),
)

softmax = register(
    Kernel(
        name="softmax",
        schema=_SCHEMA,
        contract=Contract(_CASES),
        reference=softmax_reference,
        eager=lambda self, dim, dtype: torch.softmax(self, dim, dtype=dtype),
        order=ORDER + "; one division",
        fake=_fake,
    )
)

log_softmax = register(
    Kernel(
        name="log_softmax",
        schema=_SCHEMA,
        contract=Contract(_CASES),
        reference=log_softmax_reference,
        eager=lambda self, dim, dtype: torch.log_softmax(self, dim, dtype=dtype),
        order=ORDER + "; (x - max) - log(sum)",
        fake=_fake,
    )
)

log_softmax_gather = register(
    Kernel(
        name="log_softmax_gather",
        schema="(Tensor self, int dim, Tensor index, ScalarType dtype) -> Tensor",
        contract=Contract(
            tuple(
                Case(signature, {"dim": dim, "dtype": dtype}, indices={"index": "K"})
                for signature, dim, dtype in (
                    ("self: M K, index: M N -> M N", 1, None),
                    ("self: K N, index: Q N -> Q N", 0, None),
                    ("self: M K N, index: M Q N -> M Q N", 1, None),
                    ("self: M K, index: M 1 -> M 1", 1, torch.float32),
                )
            )
        ),
        reference=log_softmax_gather_reference,
        eager=lambda self, dim, index, dtype: torch.log_softmax(self, dim, dtype=dtype).gather(
            dim, index
        ),
        order=ORDER + "; (x - max) - log(sum)",
        fake=lambda self, dim, index, dtype: self.new_empty(index.shape, dtype=dtype),
    )
)

_BACKWARD_SCHEMA = "(Tensor grad, Tensor output, int dim, ScalarType dtype) -> Tensor"
_BACKWARD_CASES = (
    Case("grad: M K, output: M K -> M K", {"dim": 1, "dtype": None}),
    Case("grad: K N, output: K N -> K N", {"dim": 0, "dtype": None}),
    Case("grad: M K N, output: M K N -> M K N", {"dim": 1, "dtype": None}),
)

softmax_backward = register(
    Kernel(
        name="softmax_backward",
        schema=_BACKWARD_SCHEMA,
        contract=Contract(_BACKWARD_CASES),
        reference=softmax_backward_reference,
        eager=_eager_backward(torch.ops.aten._softmax_backward_data),
        order="sum of grad * output in the lanes of the reduce family; (grad - sum) * output",
        fake=_fake_backward,
    )
)

log_softmax_backward = register(
    Kernel(
        name="log_softmax_backward",
        schema=_BACKWARD_SCHEMA,
        contract=Contract(_BACKWARD_CASES),
        reference=log_softmax_backward_reference,
        eager=_eager_backward(torch.ops.aten._log_softmax_backward_data),
        order="sum of grad in the lanes of the reduce family; grad - exp(output) * sum",
        fake=_fake_backward,
    )
)
