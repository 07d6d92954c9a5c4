"""Softmax and norms."""

from __future__ import annotations

import torch

from bicompile.errors import BatchStatistics
from bicompile.graph import describe_call, user_line, value
from bicompile.passes.rules.common import KERNELS, aten, outputs, prims, same_dtype, size


def _softmax(name):
    def bind(emit, self, dim, half_to_float):
        dtype = torch.float32 if half_to_float else value(self).dtype
        return emit(KERNELS[name].op, self, dim % max(value(self).dim(), 1), dtype)

    return bind


def _as_original(emit, outputs):
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
    return _as_original(emit, outputs(emit, call, 3))


def _group_norm(emit, input, weight, bias, N, C, HxW, group, eps):
    input, weight, bias = same_dtype(emit, input, weight, bias)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, group, float(eps))
    return _as_original(emit, outputs(emit, call, 3))


def _fused_rms_norm(emit, input, normalized_shape, weight, eps):
    eps = torch.finfo(value(input).dtype).eps if eps is None else float(eps)
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
    return _as_original(emit, (out, rstd))


def _batch_norm_without_stats(emit, input, weight, bias, training, momentum, eps):
    """One sample: each channel is a row of its own; more: the statistics are over the batch.

    InstanceNorm views N samples of C channels as one sample of N * C.
    """
    samples, channels = value(input).shape[:2]
    if not (isinstance(samples, int) and samples == 1):
        raise BatchStatistics(
            op=emit.node.target, given=describe_call(emit.node), line=user_line(emit.node)
        )
    input, weight, bias = same_dtype(emit, input, weight, bias)
    groups = size(emit, input, 1, channels)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, groups, float(eps))
    out, mean, rstd = outputs(emit, call, 3)
    flat = [emit(aten.reshape.default, t, [-1]) for t in (mean, rstd)]
    return _as_original(emit, (out, *flat))


def _batch_norm_in_training(emit, *args):
    raise BatchStatistics(
        op=emit.node.target, given=describe_call(emit.node), line=user_line(emit.node)
    )


OVER_THE_BATCH = (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
    aten.native_batch_norm.default,
    aten._batch_norm_with_update.default,
    aten._batch_norm_with_update_functional.default,
)
"""Refused: their statistics are over the batch."""

RULES = (
    (aten._softmax.default, "softmax", _softmax("softmax")),
    (aten._log_softmax.default, "log_softmax", _softmax("log_softmax")),
    (aten.native_layer_norm.default, "layer_norm", _layer_norm),
    (aten.native_group_norm.default, "group_norm", _group_norm),
    (aten._fused_rms_norm.default, "rms_norm", _fused_rms_norm),
    (aten._native_batch_norm_legit.no_stats, "group_norm", _batch_norm_without_stats),
    *((op, "group_norm", _batch_norm_in_training) for op in OVER_THE_BATCH),
)
