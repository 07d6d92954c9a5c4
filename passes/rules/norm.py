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


def _fused_rms_norm(emit, input, normalized_shape, weight, eps):
    wider = torch.promote_types(value(input).dtype, torch.float32)  # as PyTorch: not a half's
    eps = torch.finfo(wider).eps if eps is None else float(eps)
    if weight is not None and value(weight).dtype is not value(input).dtype:
        return NotImplemented
    ndim = len(normalized_shape)
    out = emit(KERNELS["rms_norm"].op, input, ndim, weight, eps, 0.0, False)
    if not any(user.args[1] == 1 for user in emit.node.users):
        return out, None
    # Gradients read the reciprocal root; the op computes it from the same numbers.
    wide = emit(prims.convert_element_type.default, input, torch.float32)
    squares = emit(aten.mul.Tensor, wide, wide)
    rank = value(input).dim()
    over = list(range(rank - ndim, rank))
    mean = emit(KERNELS["mean"].op, squares, over, True, torch.float32)
    rstd = emit(aten.rsqrt.default, emit(aten.add.Tensor, mean, eps))
    return as_original(emit, (out, rstd))


RULES = (
    (aten._softmax.default, "softmax", _softmax),
    (aten.native_layer_norm.default, "layer_norm", _layer_norm),
    (aten.native_group_norm.default, "group_norm", _group_norm),
    (aten._fused_rms_norm.default, "rms_norm", _fused_rms_norm),
)
