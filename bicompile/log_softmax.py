"""log_softmax and the losses over classes, opened: of a row, its maximum and its sum are kept.

    (x - max) - log(sum(exp(x - max)))

All but the two numbers of each row is pointwise, and so Inductor computes it where it is read: a
loss reads one element of each row, and a gradient computes the row again from the logits.  With a
vocabulary of 150000 the log-probabilities are else most of the memory of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bicompile.contract import HALF_AND_FLOAT
from bicompile.pooling import wide

aten = torch.ops.aten


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """In float32, rounded once."""
    top, shift = _statistics(x, dim)
    found: Tensor = (wide(x) - top) - shift
    return found if half_to_float else found.to(x.dtype)


def _statistics(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum of each row, and the logarithm of its sum."""
    if x.dtype in HALF_AND_FLOAT:
        top, shift = torch.ops.bicompile.softmax_statistics.default(x, dim % max(x.dim(), 1))
        return top, shift
    return x.logsumexp(dim, keepdim=True), x.new_zeros(())  # refused, where it is not let through


def log_softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """`grad - exp(output) * sum(grad)` in float32, rounded once."""
    grad = wide(grad_output)
    found: Tensor = grad - wide(output).exp() * grad.sum(dim, keepdim=True)
    return found.to(input_dtype)


def nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """Of each row, what goes back to the element that the target names."""
    dim = min(self.dim() - 1, 1)
    counts = target != ignore_index
    value = -grad_output
    if reduction == 1:
        value = value / total_weight
    if weight is not None:
        named = torch.where(counts, target, 0)
        value = value * weight.gather(0, named.flatten()).view(named.shape)
    value = torch.where(counts, value, 0.0).to(self.dtype)
    classes = torch.arange(self.shape[dim], device=self.device)
    classes = classes.view([-1 if d == dim else 1 for d in range(self.dim())])
    found: Tensor = torch.where(classes == target.unsqueeze(dim), value.unsqueeze(dim), 0.0)
    return found


TABLE: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._log_softmax.default: log_softmax,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten.nll_loss_backward.default: nll_loss_backward,
    aten.nll_loss2d_backward.default: nll_loss_backward,
}
