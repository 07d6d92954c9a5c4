"""BatchNorm: by running statistics, by those of one sample, and by those of the batch.

What is over the batch is `bicompile::var_mean` and, in a gradient, `bicompile::sum`, in the order
of the rows; what is pointwise then is in double, as in `group_norm`, and rounded once.
"""

from __future__ import annotations

from operator import mul

import torch
from torch.fx import Node

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, as_dtype, aten, outputs, same_dtype, size
from bicompile.passes.rules.gradients import group_norm_backward, normalised, weight_gradients
from bicompile.passes.rules.norm import as_original

OVER_THE_BATCH = (
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update_functional.default,
)
"""Their statistics are over the batch, whatever its size: they are kept for later batches."""

_OF_ONE_SAMPLE = (
    aten._native_batch_norm_legit.no_stats,
    aten.native_batch_norm_backward.default,
)


def over_the_batch(node: Node) -> bool:
    """Whether a node takes statistics over the batch, or is a gradient through them.

    Of one sample alone each channel is a row of its own. InstanceNorm views N samples of C channels
    as one sample of N * C.
    """
    if node.target not in _OF_ONE_SAMPLE:
        return node.target in OVER_THE_BATCH
    if node.target is aten.native_batch_norm_backward.default:
        return bool(node.args[7]) and not _is_one(value(node.args[1]).shape[0])
    return not _is_one(value(node.args[0]).shape[0])


def _is_one(samples) -> bool:
    return isinstance(samples, int) and samples == 1


def _along_channels(emit, x, like):
    """A number for each channel, beside all elements of the channel."""
    return emit(aten.reshape.default, x, [1, -1, *[1] * (value(like).dim() - 2)])


def _of_channels(emit, x, like):
    """The same in double."""
    return _along_channels(emit, as_dtype(emit, x, torch.float64), like)


def _others(input):
    """All axes but that of the channels."""
    return [d for d in range(value(input).dim()) if d != 1]


def _count(emit, input):
    """How many elements a channel has, in double: it may vary from call to call."""
    count = 1
    for dim in _others(input):
        n = size(emit, input, dim, value(input).shape[dim])
        count = emit(mul, count, n) if isinstance(count, Node) or isinstance(n, Node) else count * n
    return emit(aten.scalar_tensor.default, count, dtype=torch.float64, device=value(input).device)


# ---------------------------------------------------------------------------------------- forward


def _without_running_statistics(emit, input, weight, bias, training, momentum, eps):
    if over_the_batch(emit.node):
        return _by_the_batch(emit, input, weight, bias, eps)[0]
    channels = value(input).shape[1]
    input, weight, bias = same_dtype(emit, input, weight, bias)
    groups = size(emit, input, 1, channels)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, groups, float(eps))
    out, mean, rstd = outputs(emit, call, 3)
    flat = [emit(aten.reshape.default, t, [-1]) for t in (mean, rstd)]
    return as_original(emit, (out, *flat))


def _statistics(emit, input, eps):
    """Of each channel: mean and variance in float32, 1 / sqrt(variance + eps) in double."""
    x = as_dtype(emit, input, torch.float32)
    call = emit(KERNELS["var_mean"].op, x, _others(input), 0.0, False)
    variance, mean = outputs(emit, call, 2)
    rstd = emit(aten.add.Tensor, as_dtype(emit, variance, torch.float64), float(eps))
    return mean, variance, emit(aten.rsqrt.default, rstd)


def _normalised(emit, input, mean, rstd):
    """(input - mean) * rstd in double."""
    x = as_dtype(emit, input, torch.float64)
    x = emit(aten.sub.Tensor, x, _of_channels(emit, mean, input))
    return emit(aten.mul.Tensor, x, _of_channels(emit, rstd, input))


def _by_the_batch(emit, input, weight, bias, eps):
    """Output, mean and rstd as PyTorch gives them, and the statistics."""
    mean, variance, rstd = _statistics(emit, input, eps)
    out = _normalised(emit, input, mean, rstd)
    for op, factor in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if factor is not None:
            out = emit(op, out, _of_channels(emit, factor, input))
    return as_original(emit, (out, mean, rstd)), mean, variance


def _updated(emit, running, found, momentum):
    """momentum * found + (1 - momentum) * running in double, rounded once."""
    old = emit(aten.mul.Tensor, as_dtype(emit, running, torch.float64), 1 - momentum)
    new = emit(aten.mul.Tensor, as_dtype(emit, found, torch.float64), momentum)
    return as_dtype(emit, emit(aten.add.Tensor, new, old), value(running).dtype)


def _with_running_statistics(
    emit, input, weight, bias, running_mean, running_var, training, momentum, eps
):
    if not training:
        return NotImplemented
    found, mean, variance = _by_the_batch(emit, input, weight, bias, eps)
    count = _count(emit, input)
    unbiased = emit(aten.div.Tensor, count, emit(aten.sub.Tensor, count, 1))
    unbiased = emit(aten.mul.Tensor, as_dtype(emit, variance, torch.float64), unbiased)
    return (
        *found,
        _updated(emit, running_mean, mean, momentum),
        _updated(emit, running_var, unbiased, momentum),
    )


def _with_update(emit, input, weight, bias, running_mean, running_var, momentum, eps):
    """The same with what cuDNN would keep, which is nothing."""
    found = _with_running_statistics(
        emit, input, weight, bias, running_mean, running_var, True, momentum, eps
    )
    reserve = value(emit.node)[3]
    kept = emit(aten.empty.memory_format, [0], dtype=reserve.dtype, device=reserve.device)
    return (*found[:3], kept, *found[3:])


# --------------------------------------------------------------------------------------- backward


def _backward(
    emit, grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps,
    output_mask,
):  # fmt: skip
    if over_the_batch(emit.node):
        return _through_statistics(
            emit, grad_out, input, weight, save_mean, save_invstd, eps, output_mask
        )
    if train:
        shape = value(input).shape
        sizes = [size(emit, input, d, n) for d, n in enumerate(shape)]
        flat = emit(aten.reshape.default, input, [sizes[0], sizes[1], -1])
        length = size(emit, flat, 2, value(flat).shape[2])
        stats = [emit(aten.reshape.default, t, [1, -1]) for t in (save_mean, save_invstd)]
        return group_norm_backward(
            emit, grad_out, input, *stats, weight, *sizes[:2], length, sizes[1], output_mask
        )
    variance = emit(aten.add.Tensor, as_dtype(emit, running_var, torch.float64), eps)
    exact = _along_channels(emit, emit(aten.rsqrt.default, variance), input)
    rstd = as_dtype(emit, exact, torch.float32)
    found = None
    if output_mask[0]:
        scale = exact
        if weight is not None:
            scale = emit(aten.mul.Tensor, exact, _of_channels(emit, weight, input))
        scale = as_dtype(emit, scale, torch.float32)
        found = emit(aten.mul.Tensor, as_dtype(emit, grad_out, torch.float32), scale)
        found = as_dtype(emit, found, value(input).dtype)

    def y():
        return normalised(emit, input, _along_channels(emit, running_mean, input), rstd)

    dtype = value(input if weight is None else weight).dtype
    return found, *weight_gradients(emit, grad_out, y, _others(input), dtype, output_mask[1:])


def _through_statistics(emit, grad_out, input, weight, mean, rstd, eps, output_mask):
    """`rstd * weight * (g - mean(g) - y * mean(g * y))`, means over all but the channels.

    On a CPU statistics of half types are kept rounded: they are computed again.
    """
    if value(mean).dtype is not torch.float32:
        mean, _, rstd = _statistics(emit, input, eps)
    y = _normalised(emit, input, mean, rstd)
    grad = as_dtype(emit, grad_out, torch.float64)

    def summed(x):
        x = as_dtype(emit, x, torch.float32)
        return emit(KERNELS["sum"].op, x, _others(input), False, torch.float32)

    of_y, of_1 = summed(emit(aten.mul.Tensor, grad, y)), summed(grad)
    found = None
    if output_mask[0]:
        count = _count(emit, input)
        mean_y, mean_1 = (
            emit(aten.div.Tensor, _of_channels(emit, s, input), count) for s in (of_y, of_1)
        )
        found = emit(aten.sub.Tensor, grad, mean_1)
        found = emit(aten.sub.Tensor, found, emit(aten.mul.Tensor, y, mean_y))
        for factor in (rstd, weight):
            if factor is not None:
                found = emit(aten.mul.Tensor, found, _of_channels(emit, factor, input))
        found = as_dtype(emit, found, value(input).dtype)
    dtype = value(input if weight is None else weight).dtype
    wanted = zip((of_y, of_1), output_mask[1:], strict=True)
    return found, *(as_dtype(emit, s, dtype) if w else None for s, w in wanted)


RULES = (
    (aten._native_batch_norm_legit.no_stats, "group_norm", _without_running_statistics),
    (aten._native_batch_norm_legit_functional.default, "var_mean", _with_running_statistics),
    (aten._batch_norm_with_update_functional.default, "var_mean", _with_update),
    (aten.native_batch_norm_backward.default, "group_norm_backward", _backward),
)
