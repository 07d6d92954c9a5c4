"""Ops of the norm family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "mean, then variance around it, both in the lanes of the reduce family"


def layer_norm_reference(input, normalized_ndim, weight, bias, eps):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last `normalized_ndim` axes."""
    dim = tuple(range(-normalized_ndim, 0))
    var, mean = torch.var_mean(input, dim, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    out = (input - mean) * rstd
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out, mean, rstd


def rms_norm_reference(input, normalized_ndim, weight, eps, offset, round_first):
    """`x / sqrt(mean(x * x) + eps) * (offset + weight)` over the last `normalized_ndim` axes."""
    dim = tuple(range(-normalized_ndim, 0))
    out = input * ((input * input).mean(dim, keepdim=True) + eps).rsqrt()
    return out if weight is None else out * (offset + weight)


def group_norm_reference(input, weight, bias, groups, eps):
    """Each of `groups` runs of channels of each sample is normalised by itself."""
    x = input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)
    b, c, size = x.shape
    per_channel = c // groups
    var, mean = torch.var_mean(x.reshape(b, groups, per_channel * size), 2, correction=0)
    rstd = (var + eps).rsqrt()
    out = (x - mean.repeat_interleave(per_channel, 1)[..., None]) * rstd.repeat_interleave(
        per_channel, 1
    )[..., None]
    if weight is not None:
        out = out * weight[:, None]
    if bias is not None:
        out = out + bias[:, None]
    return out.reshape(input.shape), mean, rstd


def _input_gradient(grad, input, mean, rstd, weight, dim):
    g = grad if weight is None else grad * weight
    y = (input if mean is None else input - mean) * rstd
    out = g - y * (g * y).mean(dim, keepdim=True)
    return (out if mean is None else out - g.mean(dim, keepdim=True)) * rstd


def layer_norm_backward_reference(grad, input, normalized_ndim, mean, rstd, weight):
    """`rstd * (g - mean(g) - y * mean(g * y))`: `g = grad * weight`, `y = (input - mean) * rstd`.

    Without a mean, as in rms_norm, there is no `mean(g)`.
    """
    return _input_gradient(grad, input, mean, rstd, weight, tuple(range(-normalized_ndim, 0)))


def group_norm_backward_reference(grad, input, mean, rstd, weight, groups):
    """The same over each group of channels of a sample."""
    c = input.shape[1]
    g, x = (t.flatten(2).unflatten(1, (groups, c // groups)) for t in (grad, input))
    weight = None if weight is None else weight.reshape(groups, -1, 1)
    out = _input_gradient(g, x, mean[..., None, None], rstd[..., None, None], weight, (2, 3))
    return out.reshape(input.shape)


def _layer_norm_fake(input, normalized_ndim, weight, bias, eps):
    stats = [*input.shape[: input.dim() - normalized_ndim], *[1] * normalized_ndim]
    mean = input.new_empty(stats, dtype=torch.float32)
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


def _rms_norm_fake(input, normalized_ndim, weight, eps, offset, round_first):
    return input.new_empty(input.shape)


def _group_norm_fake(input, weight, bias, groups, eps):
    mean = input.new_empty((input.shape[0], groups), dtype=torch.float32)
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


def _layer_norm_backward_fake(grad, input, normalized_ndim, mean, rstd, weight):
    return input.new_empty(input.shape)


def _group_norm_backward_fake(grad, input, mean, rstd, weight, groups):
    return input.new_empty(input.shape)


def _eager_layer_norm(input, normalized_ndim, weight, bias, eps):
    return torch.native_layer_norm(input, input.shape[-normalized_ndim:], weight, bias, eps)


def _eager_rms_norm(input, normalized_ndim, weight, eps, offset, round_first):
    x = input.float()
    dim = tuple(range(-normalized_ndim, 0))
    out = x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)
    if round_first or weight is None:
        out = out.to(input.dtype)
        return out if weight is None else out * (offset + weight if offset else weight)
    return (out * (offset + weight.float())).to(input.dtype)


def _eager_group_norm(input, weight, bias, groups, eps):
    if input.dim() == 2:
        out, mean, rstd = _eager_group_norm(input.unsqueeze(2), weight, bias, groups, eps)
        return out.squeeze(2), mean, rstd
    b, c = input.shape[:2]
    size = input[0, 0].numel()
    return torch.native_group_norm(input.contiguous(), weight, bias, b, c, size, groups, eps)


def _eager_layer_norm_backward(grad, input, normalized_ndim, mean, rstd, weight):
    if mean is None:
        wide = (None if t is None else t.float() for t in (grad, input, rstd, weight))
        g, x, r, w = wide
        dim = tuple(range(-normalized_ndim, 0))
        return _input_gradient(g, x, None, r, w, dim).to(input.dtype)
    shape = input.shape[-normalized_ndim:]
    only_input = [True, False, False]
    if input.is_cuda:  # has statistics in float32 only
        mean, rstd = mean.float(), rstd.float()
    args = (grad, input, shape, mean, rstd, weight, None, only_input)
    return torch.ops.aten.native_layer_norm_backward(*args)[0]


def _eager_group_norm_backward(grad, input, mean, rstd, weight, groups):
    b, c = input.shape[:2]
    size = input[0, 0].numel()
    args = (grad, input, mean, rstd, weight, b, c, size, groups, [True, False, False])
    return torch.ops.aten.native_group_norm_backward(*args)[0]


layer_norm = register(
    Kernel(
        name="layer_norm",
        schema="(Tensor input, int normalized_ndim, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        contract=Contract(
            (
                Case(
                    "input: M K, weight?: K, bias?: K -> M K, M 1, M 1",
                    {"normalized_ndim": 1, "eps": 1e-5},
                ),
                Case(
                    "input: B M K1 K2, weight?: K1 K2, bias?: K1 K2 -> B M K1 K2, B M 1 1, B M 1 1",
                    {"normalized_ndim": 2, "eps": 1e-5},
                ),
            )
        ),
        reference=layer_norm_reference,
        eager=_eager_layer_norm,
        order=ORDER,
        fake=_layer_norm_fake,
    )
)

rms_norm = register(
    Kernel(
        name="rms_norm",
        schema="(Tensor input, int normalized_ndim, Tensor? weight, float eps, float offset,"
        " bool round_first) -> Tensor",
        contract=Contract(
            tuple(
                Case(
                    "input: M K, weight?: K -> M K",
                    {
                        "normalized_ndim": 1,
                        "eps": 1e-6,
                        "offset": offset,
                        "round_first": round_first,
                    },
                )
                for offset, round_first in ((0.0, True), (0.0, False), (1.0, False), (1.0, True))
            )
        ),
        reference=rms_norm_reference,
        eager=_eager_rms_norm,
        order="mean of the rounded squares in the lanes of the reduce family",
        fake=_rms_norm_fake,
    )
)

group_norm = register(
    Kernel(
        name="group_norm",
        schema="(Tensor input, Tensor? weight, Tensor? bias, int groups, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        contract=Contract(
            (
                Case(
                    "input: B C K, weight?: C, bias?: C -> B C K, B G, B G",
                    {"groups": 2, "eps": 1e-5},
                ),
                Case(
                    "input: B C K1 K2, weight?: C, bias?: C -> B C K1 K2, B G, B G",
                    {"groups": 1, "eps": 1e-5},
                ),
            )
        ),
        reference=group_norm_reference,
        eager=_eager_group_norm,
        order=ORDER + " over the channels and positions of a group",
        fake=_group_norm_fake,
    )
)

BACKWARD_ORDER = "means of g and g * y over the row in the lanes of the reduce family; in double"

layer_norm_backward = register(
    Kernel(
        name="layer_norm_backward",
        schema="(Tensor grad, Tensor input, int normalized_ndim, Tensor? mean, Tensor rstd,"
        " Tensor? weight) -> Tensor",
        contract=Contract(
            (
                Case(
                    "grad: M K, input: M K, mean?: M 1, rstd: M 1, weight?: K -> M K",
                    {"normalized_ndim": 1},
                ),
                Case(
                    "grad: B M K1 K2, input: B M K1 K2, mean?: B M 1 1, rstd: B M 1 1,"
                    " weight?: K1 K2 -> B M K1 K2",
                    {"normalized_ndim": 2},
                ),
            )
        ),
        reference=layer_norm_backward_reference,
        eager=_eager_layer_norm_backward,
        order=BACKWARD_ORDER,
        fake=_layer_norm_backward_fake,
    )
)

group_norm_backward = register(
    Kernel(
        name="group_norm_backward",
        schema="(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, int groups)"
        " -> Tensor",
        contract=Contract(
            (
                Case(
                    "grad: B C K, input: B C K, mean: B G, rstd: B G, weight?: C -> B C K",
                    {"groups": 2},
                ),
                Case(
                    "grad: B C K1 K2, input: B C K1 K2, mean: B G, rstd: B G, weight?: C"
                    " -> B C K1 K2",
                    {"groups": 1},
                ),
            )
        ),
        reference=group_norm_backward_reference,
        eager=_eager_group_norm_backward,
        order=BACKWARD_ORDER,
        fake=_group_norm_backward_fake,
    )
)
