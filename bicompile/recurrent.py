"""Cells of recurrent nets as a GPU has them, one kernel of PyTorch's, opened into pointwise ops.

`nn.LSTMCell` and `nn.GRUCell` call `aten._thnn_fused_lstm_cell` and `aten._thnn_fused_gru_cell`
there, with the two matrix products done; what is left has no sum but that of a bias's gradient,
over the batch.  Half types are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bicompile.pooling import wide

aten = torch.ops.aten


def _gates(x: Tensor, h: Tensor, x_bias: Tensor | None, h_bias: Tensor | None) -> tuple[Any, Any]:
    x, h = wide(x), wide(h)
    return (
        x if x_bias is None else x + wide(x_bias),
        h if h_bias is None else h + wide(h_bias),
    )


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next h and c, and the gates i, f, g, o for the gradient."""
    x, h = _gates(input_gates, hidden_gates, input_bias, hidden_bias)
    i, f, g, o = (x + h).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * wide(cx) + i * g
    kept = torch.cat([i, f, g, o], 1)
    return (o * c.tanh()).to(cx.dtype), c.to(cx.dtype), kept.to(cx.dtype)


def lstm_cell_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    cx: Tensor,
    cy: Tensor,
    workspace: Tensor,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for both sides' gates, for c, and for each bias."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    i, f, g, o = wide(workspace).chunk(4, 1)
    bent = wide(cy).tanh()
    to_c: Any = 0.0 if grad_cy is None else wide(grad_cy)
    to_o: Any = 0.0
    if grad_hy is not None:
        to_o = wide(grad_hy) * bent
        to_c = wide(grad_hy) * o * (1 - bent * bent) + to_c
    gates = torch.cat(
        [
            to_c * g * (1 - i) * i,
            to_c * wide(cx) * (1 - f) * f,
            to_c * i * (1 - g * g),
            to_o * (1 - o) * o + torch.zeros_like(o),
        ],
        1,
    )
    bias = gates.sum(0).to(cx.dtype) if has_bias else None
    return gates.to(cx.dtype), (to_c * f).to(cx.dtype), bias


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next h, and r, z, n, h and what r let through, for the gradient."""
    x, h = _gates(input_gates, hidden_gates, input_bias, hidden_bias)
    (r, z, n), (h_r, h_z, h_n) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (r + h_r).sigmoid(), (z + h_z).sigmoid()
    n = (n + r * h_n).tanh()
    before = wide(hx)
    kept = torch.cat([r, z, n, before, h_n], 1)
    return (n + z * (before - n)).to(hx.dtype), kept.to(hx.dtype)


def gru_cell_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for the gates of either side, for h, and for each bias."""
    grad, dtype = wide(grad_hy), workspace.dtype
    r, z, n, before, h_n = wide(workspace).chunk(5, 1)
    to_z = grad * (before - n) * (1 - z) * z
    to_n = grad * (1 - z) * (1 - n * n)
    to_r = to_n * h_n * (1 - r) * r
    sides = torch.cat([to_r, to_z, to_n], 1), torch.cat([to_r, to_z, to_n * r], 1)
    biases = [side.sum(0).to(dtype) if has_bias else None for side in sides]
    return sides[0].to(dtype), sides[1].to(dtype), (grad * z).to(dtype), biases[0], biases[1]


TABLE: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
    aten._thnn_fused_gru_cell.default: gru_cell,
    aten._thnn_fused_gru_cell_backward.default: gru_cell_backward,
}
