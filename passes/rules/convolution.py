"""Convolutions: one op for all ranks, transposed or not."""

from __future__ import annotations

from bicompile.graph import constant, value
from bicompile.passes.rules.common import KERNELS, aten
from bicompile.passes.rules.matmul import tf32


def _convolution(
    emit, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
):
    rank = value(weight).dim() - 2
    if not 1 <= rank <= 3:
        return NotImplemented
    given = (stride, padding, dilation, output_padding)
    numbers = ([constant(i) for i in n] * (rank if len(n) == 1 else 1) for n in given)
    stride, padding, dilation, output_padding = numbers
    groups = constant(groups)
    for taps in value(weight).shape[2:]:  # sizes of the result without symbols in their products
        int(taps)
    return emit(
        KERNELS["convolution"].op,
        *(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups),
        tf32(input),
    )


RULES = ((aten.convolution.default, "convolution", _convolution),)
