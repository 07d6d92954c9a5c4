"""Convolutions: one op for all ranks, transposed or not."""

from __future__ import annotations

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten
from bicompile.passes.rules.matmul import tf32


def _convolution(
    emit, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
):
    rank = value(weight).dim() - 2
    given = (stride, padding, dilation, output_padding)
    numbers = [list(n) * (rank if len(n) == 1 else 1) for n in given]
    if not 1 <= rank <= 3 or not all(isinstance(i, int) for n in numbers for i in n):
        return NotImplemented
    stride, padding, dilation, output_padding = numbers
    return emit(
        KERNELS["convolution"].op,
        *(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups),
        tf32(input),
    )


RULES = ((aten.convolution.default, "convolution", _convolution),)
