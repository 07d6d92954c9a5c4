"""Softmax and norms."""

from __future__ import annotations

import torch

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, outputs, prims, same_dtype


def _softmax(emit, self, dim, half_to_float):
    dtype = torch.float32 if half_to_float else value(self).dtype
    return emit(KERNELS["softmax"].op, self, dim % max(value(self).dim(), 1), dtype)


def as_original(emit, outputs):
    """Statistics in the dtype that PyTorch gives them on this device."""
    wanted = value(emit.node)
    return tuple(
        out
        if value(out).dtype is like.dtype
        else emit(prims.convert_element_type.default, out, like.dtype)
        for out, like in zip(outputs, wanted, strict=False)
    )


def _layer_norm(emit, input, normalized_shape, weight, bias, eps):
    input, weight, bias = same_dtype(emit, input, weight, bias)
    call = emit(KERNELS["layer_norm"].op, input, len(normalized_shape), weight, bias, float(eps))
    return as_original(emit, outputs(emit, call, 3))


def _group_norm(emit, input, weight, bias, N, C, HxW, group, eps):
    input, weight, bias = same_dtype(emit, input, weight, bias)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, group, float(eps))
    return as_original(emit, outputs(emit, call, 3))


RULES = (
    (aten._softmax.default, "softmax", _softmax),
    (aten.native_layer_norm.default, "layer_norm", _layer_norm),
    (aten.native_group_norm.default, "group_norm", _group_norm),
)
