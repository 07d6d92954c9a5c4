"""Interpolation of images by neighbours and factors, opened before our passes see it.

Which neighbours of an image an element of the result has, and the factor of each, follows from the
sizes alone. Both are computed in float64: a place in float32 has an error of its own size, which is
larger than that of all the products. Along an axis, a resize is::

    %x0 = aten._unsafe_index(%x, [None, None, None, %place0]) * %factor0
    %x1 = aten._unsafe_index(%x, [None, None, None, %place1]) * %factor1
    ...
    %y = %x0 + %x1 + ...

With `antialias` there are more neighbours the smaller the result is; more than `FEW` are a sum of
ours.  Half types are added in float32 and rounded once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bicompile.contract import HALF_AND_FLOAT
from bicompile.pooling import wide

aten = torch.ops.aten
FEW = 5  # pinned: up to so many neighbours are added one after the other


def upsample_bicubic2d(
    x: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None = None,
) -> Any:
    """`F.interpolate(mode="bicubic")`: four neighbours along each axis, times their factors."""
    if x.dtype not in HALF_AND_FLOAT:
        return NotImplemented

    def axis(dim: int) -> list[tuple[Tensor, Tensor]]:
        n, scale = x.shape[dim], scale_factors[dim] if scale_factors else None
        if output_size:
            out = output_size[dim]
        else:
            assert scale is not None  # one of the two is given
            out = n * int(scale) if scale == int(scale) else torch.sym_int(n * scale)
        at = torch.arange(out, device=x.device).to(torch.float64)
        step = _step(n, out, align_corners, scale)
        at = at * step if align_corners else (at + 0.5) * step - 0.5
        first = at.floor()
        t = at - first
        distances = t + 1, t, 1 - t, 2 - t
        return [
            ((first.long() + i - 1).clamp(0, n - 1), _cubic(d, -0.75).float())
            for i, d in enumerate(distances)
        ]

    columns = axis(-1)
    rows = [(at[:, None], factor[:, None]) for at, factor in axis(-2)]
    image = wide(x)
    total = sum(
        factor * sum(f * aten._unsafe_index(image, [None, None, row, at]) for at, f in columns)
        for row, factor in rows
    )
    return total.to(x.dtype)


def antialiased(
    reach: int,
    kernel: Callable[[Tensor], Tensor],
    x: Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Any:
    """`F.interpolate(antialias=True)`: one axis after the other, the columns first.

    Args:
        reach: the largest distance of a neighbour, where the image is not made smaller.
        kernel: of a distance, in units of the larger of both images' elements.
        x: [B, C, H, W].
        output_size: H and W of the result.
        align_corners: whether the centres of the corners stay where they are.
        scales_h: H of the result by H, if it was given.
        scales_w: W of the result by W, if it was given.
    """
    if x.dtype not in HALF_AND_FLOAT:
        return NotImplemented
    image = wide(x)
    for dim, scale in ((-1, scales_w), (-2, scales_h)):
        n, out = image.shape[dim], output_size[dim]
        step = _step(n, out, align_corners, scale)
        neighbours = _neighbours(n, out, step, reach, kernel, x.device)
        image = _resized(image.transpose(dim, -1), *neighbours).transpose(dim, -1)
    return image.to(x.dtype)


def _step(n: int, out: int, align_corners: bool, scale: float | None) -> float:
    """How far apart on the image neighbours in the result are."""
    if align_corners:
        return (n - 1) / (out - 1) if out > 1 else 0.0
    return 1 / scale if scale else n / out


def _neighbours(
    n: int,
    out: int,
    step: float,
    reach: int,
    kernel: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Places and factors of the neighbours of each element, [out, T]."""
    stretch = max(step, 1.0)
    support = reach * stretch
    centre = (torch.arange(out, device=device).to(torch.float64)[:, None] + 0.5) * step
    first = (centre - support + 0.5).floor().clamp(min=0)
    end = (centre + support + 0.5).floor().clamp(max=n)
    place = first + torch.arange(2 * math.ceil(support) + 1, device=device)
    factor = kernel(((place - centre + 0.5) / stretch).abs())
    factor = torch.where(place < end, factor, 0.0)
    total = factor.float().sum(-1, keepdim=True)
    return place.clamp(max=n - 1).long(), (factor / total).float()


def _resized(x: Tensor, places: Tensor, factors: Tensor) -> Tensor:
    """x [.., N], places and factors [out, T] -> [.., out]."""

    def terms(place: Tensor, factor: Tensor) -> Tensor:
        """What has no part in the result may be infinite."""
        found: Tensor = aten._unsafe_index(x, [None, None, None, place])
        return torch.where(factor == 0, 0.0, found * factor)

    if places.shape[1] > FEW:
        return terms(places, factors).sum(-1)
    each = zip(places.unbind(1), factors.unbind(1), strict=True)
    return functools.reduce(torch.add, itertools.starmap(terms, each))


def _linear(d: Tensor) -> Tensor:
    return (1 - d).clamp(min=0)


def _cubic(d: Tensor, a: float) -> Tensor:
    """Keys, Cubic convolution interpolation for digital image processing (1981)."""
    inside = ((a + 2) * d - (a + 3)) * d * d + 1
    outside = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d < 1, inside, torch.where(d < 2, outside, 0.0))


def _lanczos(d: Tensor) -> Tensor:
    return torch.where(d < 3, torch.sinc(d) * torch.sinc(d / 3), 0.0)


_KERNELS: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1, _linear),
    "bicubic": (2, functools.partial(_cubic, a=-0.5)),
    "lanczos": (3, _lanczos),  # since PyTorch 2.13
}
TABLE: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.upsample_bicubic2d.vec: upsample_bicubic2d,
    **{
        getattr(aten, f"_upsample_{name}2d_aa").default: functools.partial(antialiased, *kernel)
        for name, kernel in _KERNELS.items()
        if hasattr(aten, f"_upsample_{name}2d_aa")
    },
}
