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


def _layer_norm_fake(input, normalized_ndim, weight, bias, eps):
    stats = [*input.shape[: input.dim() - normalized_ndim], *[1] * normalized_ndim]
    mean = input.new_empty(stats, dtype=torch.float32)
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


def _rms_norm_fake(input, normalized_ndim, weight, eps, offset, round_first):
    return input.new_empty(input.shape)


def _group_norm_fake(input, weight, bias, groups, eps):
    mean = input.new_empty((input.shape[0], groups), dtype=torch.float32)
    return input.new_empty(input.shape), mean, torch.empty_like(mean)


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
