"""Convolutions and their gradients: one op for all ranks, transposed or not.

The gradient of an input is a convolution too, that of a weight a product summed over all images and
positions in their order, that of a bias a sum.
"""

from __future__ import annotations

import math

import torch

from bicompile.graph import constant, value
from bicompile.passes.rules.common import KERNELS, aten, size
from bicompile.passes.rules.matmul import tf32

PART = 256  # pinned: terms of a product that is a part of a weight's gradient


def _numbers(rank, *given):
    """Numbers for each axis, where one may stand for all."""
    return [[constant(i) for i in n] * (rank if len(n) == 1 else 1) for n in given]


def _convolution(
    emit, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
):
    rank = value(weight).dim() - 2
    if not 1 <= rank <= 3:
        return NotImplemented
    stride, padding, dilation, output_padding = _numbers(
        rank, stride, padding, dilation, output_padding
    )
    groups = constant(groups)
    # Channels are the weight's, and sizes of the result have no symbols in their products.
    for size_of_the_weight in (value(input).shape[1], *value(weight).shape[2:]):
        int(size_of_the_weight)
    return emit(
        KERNELS["convolution"].op,
        *(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups),
        tf32(input),
    )


def _cut(emit, x, dim, like, axis):
    """The first elements of x along an axis, as many as `like` has along one of its own."""
    return emit(aten.slice.Tensor, x, dim, 0, size(emit, like, axis, value(like).shape[axis]))


def _grouped(emit, x, groups, channels):
    """[B, G * C, I...] -> [B, G, C, I...]."""
    batch, _, *image = (size(emit, x, d, n) for d, n in enumerate(value(x).shape))
    return emit(aten.reshape.default, x, [batch, groups, channels, *image])


def _product(emit, rows, columns, part):
    """[G, M, K] by [G, K, N]; in single precision, the sum of the products of parts of K.

    PyTorch, too, adds up products of few images or positions, whose errors are small.
    """
    length = value(rows).shape[2]
    few = isinstance(length, int) and length <= part
    if few or value(rows).dtype is not torch.float32:  # a half type would round each product
        return emit(KERNELS["bmm"].op, rows, columns, tf32(rows))
    groups, height, width = *value(rows).shape[:2], value(columns).shape[2]
    rows = emit(aten.constant_pad_nd.default, rows, [0, part - 1], 0.0)
    rows = emit(aten.unfold.default, rows, 2, part, part)
    rows = emit(aten.permute.default, rows, [0, 2, 1, 3])
    rows = emit(aten.reshape.default, rows, [-1, height, part])
    columns = emit(aten.constant_pad_nd.default, columns, [0, 0, 0, part - 1], 0.0)
    columns = emit(aten.unfold.default, columns, 1, part, part)
    columns = emit(aten.permute.default, columns, [0, 1, 3, 2])
    columns = emit(aten.reshape.default, columns, [-1, part, width])
    found = emit(KERNELS["bmm"].op, rows, columns, tf32(rows))
    found = emit(aten.reshape.default, found, [groups, -1, height, width])
    return emit(KERNELS["sum"].op, found, [1], False, torch.float32)


def _weight_gradient(emit, over, at, taps, stride, padding, dilation, groups, cut):
    """Sums of at[b, m, p] * over[b, c, p * stride + w * dilation - padding] over (b, p).

    over: [B, G * C, I...], at: [B, G * M, P...], taps: W... -> [G * M, C, W...].  Pinned: the chain
    of bmm over k = b * P + p, in parts of PART terms, or of M where that is more: the products of
    the parts are no larger than what is multiplied.
    """
    rank = len(taps)
    axes = range(3, 3 + rank)
    width, height = (int(value(t).shape[1]) // groups for t in (over, at))
    columns = _grouped(emit, over, groups, width)
    if any(padding):
        around = [n for p in reversed(padding) for n in (p, p)]
        columns = emit(aten.constant_pad_nd.default, columns, around, 0.0)
    for axis, w, s, d in zip(axes, taps, stride, dilation, strict=True):
        columns = emit(aten.unfold.default, columns, axis, d * (w - 1) + 1, s)
    for axis, d in zip(axes, dilation, strict=True):
        if d > 1:
            columns = emit(aten.slice.Tensor, columns, axis + rank, 0, None, d)
        if cut:
            columns = _cut(emit, columns, axis, at, axis - 1)
    order = [1, 0, *axes, 2, *range(3 + rank, 3 + 2 * rank)]
    columns = emit(aten.permute.default, columns, order)
    columns = emit(aten.reshape.default, columns, [groups, -1, width * math.prod(taps)])
    rows = emit(aten.permute.default, _grouped(emit, at, groups, height), [1, 2, 0, *axes])
    rows = emit(aten.reshape.default, rows, [groups, height, -1])
    found = _product(emit, rows, columns, max(PART, height))
    return emit(aten.reshape.default, found, [groups * height, width, *taps])


def _convolution_backward(
    emit, grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed,
    output_padding, groups, output_mask,
):  # fmt: skip
    taps = [int(n) for n in value(weight).shape[2:]]
    rank = len(taps)
    if not 1 <= rank <= 3:
        return NotImplemented
    stride, padding, dilation, output_padding = _numbers(
        rank, stride, padding, dilation, output_padding
    )
    groups = constant(groups)
    grad_input = grad_weight = grad_bias = None
    if transposed:
        extra = [0] * rank
        cut = any(e >= s for e, s in zip(output_padding, stride, strict=True))
    else:  # as far as any image reaches that has this result
        extra = [s - 1 for s in stride]
        cut = any(extra)
    if output_mask[0]:
        given = (stride, padding, dilation, not transposed, extra, groups)
        grad_input = _convolution(emit, grad_output, weight, None, *given)
        for axis in range(2, 2 + rank) if cut else ():
            grad_input = _cut(emit, grad_input, axis, input, axis)
    if output_mask[1]:
        over, at = (grad_output, input) if transposed else (input, grad_output)
        given = (taps, stride, padding, dilation, groups, transposed and cut)
        grad_weight = _weight_gradient(emit, over, at, *given)
    if output_mask[2]:
        others = [0, *range(2, 2 + rank)]
        grad_bias = emit(KERNELS["sum"].op, grad_output, others, False, value(grad_output).dtype)
    return grad_input, grad_weight, grad_bias


RULES = (
    (aten.convolution.default, "convolution", _convolution),
    (aten.convolution_backward.default, "convolution", _convolution_backward),
)
