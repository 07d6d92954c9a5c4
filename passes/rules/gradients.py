"""Gradients that PyTorch has ops of their own for.

What goes back to an input is a row op like the forward; what goes to a weight or a bias is a sum
over all rows, by `bicompile::sum` or `bicompile::index_add`, in the order of the rows.
"""

from __future__ import annotations

import torch

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, as_dtype, aten, fill, rows_of_zeros, size


def _softmax_backward(emit, grad_output, output, dim, input_dtype):
    dim %= max(value(output).dim(), 1)
    return emit(KERNELS["softmax_backward"].op, grad_output, output, dim, input_dtype)


# ------------------------------------------------------------------------------------------ norms


def _sum(emit, x, dim, dtype):
    """The sum of float32 terms over all rows, rounded once."""
    return emit(KERNELS["sum"].op, x, list(dim), False, dtype)


def normalised(emit, input, mean, rstd):
    """(input - mean) * rstd in float32."""
    x = as_dtype(emit, input, torch.float32)
    if mean is not None:
        x = emit(aten.sub.Tensor, x, as_dtype(emit, mean, torch.float32))
    return emit(aten.mul.Tensor, x, as_dtype(emit, rstd, torch.float32))


def weight_gradients(emit, grad, normalised, dim, like, wanted):
    """Gradients of a weight and a bias; None where they are not wanted."""
    grad = as_dtype(emit, grad, torch.float32)
    weight = bias = None
    if wanted[0]:
        weight = _sum(emit, emit(aten.mul.Tensor, grad, normalised()), dim, like)
    if wanted[1]:
        bias = _sum(emit, grad, dim, like)
    return weight, bias


def _layer_norm_backward(
    emit, grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask
):
    ndim = len(normalized_shape)
    found = None
    if output_mask[0]:
        op = KERNELS["layer_norm_backward"].op
        found = emit(op, grad_out, input, ndim, mean, rstd, weight)
    return found, *weight_gradients(
        emit,
        grad_out,
        lambda: normalised(emit, input, mean, rstd),
        range(value(input).dim() - ndim),
        value(input if weight is None else weight).dtype,
        output_mask[1:],
    )


def group_norm_backward(emit, grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
    """A row op for the input, sums over all samples for the weight and the bias."""
    found = None
    if output_mask[0]:
        op = KERNELS["group_norm_backward"].op
        found = emit(op, grad_out, input, mean, rstd, weight, group)
    grouped = [N, group, -1, HxW]

    def in_groups():
        stats = (emit(aten.reshape.default, t, [N, group, 1, 1]) for t in (mean, rstd))
        return normalised(emit, emit(aten.reshape.default, input, grouped), *stats)

    grad = emit(aten.reshape.default, grad_out, grouped)
    dtype = value(input if weight is None else weight).dtype
    sums = weight_gradients(emit, grad, in_groups, [0, 3], dtype, output_mask[1:])
    return found, *(None if t is None else emit(aten.reshape.default, t, [-1]) for t in sums)


# -------------------------------------------------------------------------------------- embedding


def embedding_rows(emit, grad_output, indices, padding_idx):
    """The rows of a table that each row of the gradient is added to, and these rows [N, width]."""
    like = value(grad_output)
    width = size(emit, grad_output, like.dim() - 1, like.shape[-1])
    rows = emit(aten.reshape.default, grad_output, [-1, width])
    index = emit(aten.reshape.default, indices, [-1])
    if not (isinstance(padding_idx, int) and padding_idx < 0):
        padding = emit(aten.unsqueeze.default, emit(aten.eq.Scalar, index, padding_idx), 1)
        rows = fill(emit, rows, padding, 0.0)
    return index, rows


def _embedding_dense_backward(
    emit, grad_output, indices, num_weights, padding_idx, scale_grad_by_freq
):
    """Rows of the gradient, added to the rows of the table that they came from."""
    if scale_grad_by_freq:
        return NotImplemented
    index, rows = embedding_rows(emit, grad_output, indices, padding_idx)
    width = size(emit, rows, 1, value(rows).shape[1])
    start = rows_of_zeros(emit, num_weights, width, value(grad_output))
    return emit(KERNELS["index_add"].op, start, index, rows, 1.0)


RULES = (
    (aten._softmax_backward_data.default, "softmax_backward", _softmax_backward),
    (aten.native_layer_norm_backward.default, "layer_norm_backward", _layer_norm_backward),
    (aten.native_group_norm_backward.default, "group_norm_backward", group_norm_backward),
    (aten.embedding_dense_backward.default, "index_add", _embedding_dense_backward),
)
