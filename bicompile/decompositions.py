"""Ops opened into others before our passes see them: what is left is pointwise, or a sum we own.

The end of `F.fold`, for example, is a sum of images in which each tap of the windows lies where it
belongs; a distance is a norm of differences; the most frequent element is the end of the longest
run of a sorted row.  Half types are added in float32 and rounded once.  Pooling, interpolation,
recurrent cells and log_softmax have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bicompile import interpolation, log_softmax, pooling, recurrent
from bicompile.pooling import apart, wide

aten = torch.ops.aten


def col2im(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """`F.fold`: each tap of the windows lies on the image; the taps are added in their order."""
    wanted = [n + 2 * p for n, p in zip(output_size, padding, strict=True)]
    counts = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(wanted, dilation, kernel_size, stride, strict=True)
    ]
    windows = wide(x).unflatten(-1, counts).unflatten(-3, [-1, *kernel_size])
    total: Tensor | None = None
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            tap = windows[..., i, j, :, :]
            for dim, at in ((-2, i * dilation[0]), (-1, j * dilation[1])):
                tap = apart(tap, dim, stride[dim], at, wanted[dim])
            total = tap if total is None else total + tap
    assert total is not None  # a kernel has a tap
    image: Tensor = total
    for dim in (-2, -1):
        image = image.narrow(dim, padding[dim], output_size[dim])
    return image.to(x.dtype)


def trilinear(
    one: Tensor,
    two: Tensor,
    three: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """`nn.Bilinear`: a matrix product, then a sum for each output; else one sum of products."""
    dtype = one.dtype
    one, two, three = wide(one), wide(two), wide(three)
    if [*expand1, *expand2, *expand3, *sumdim] == [1, 3, 0, 1, 2, 2, 3]:
        outputs, length, width = two.shape
        half = one @ two.transpose(0, 1).reshape(length, outputs * width)
        terms: Tensor = half.unflatten(-1, [outputs, width]) * three.unsqueeze(1)
        return terms.sum(-1).to(dtype)
    factors = []
    for factor, dims in ((one, expand1), (two, expand2), (three, expand3)):
        for dim in dims:
            factor = factor.unsqueeze(dim)
        factors.append(factor)
    product: Tensor = factors[0] * factors[1] * factors[2]
    return product.sum(list(sumdim)).to(dtype)


def cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """Norms of differences; never by way of a product, which loses small distances."""
    norms: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    return norms


def cross(x: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    """`torch.linalg.cross`; products of float32 are exact in float64, and rounded once."""
    exact = torch.float64 if x.dtype is torch.float32 else torch.float32
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return NotImplemented  # type: ignore[no-any-return]
    a, b = torch.broadcast_tensors(x.to(exact), other.to(exact))
    (a1, a2), (b1, b2) = ((t.roll(-1, dim), t.roll(-2, dim)) for t in (a, b))
    product: Tensor = a1 * b2 - a2 * b1
    return product.to(x.dtype)


def pdist(x: Tensor, p: float = 2) -> Tensor:
    """Norms of the differences of all pairs of rows."""
    rows, others = torch.triu_indices(len(x), len(x), 1, device=x.device)
    norms: Tensor = torch.linalg.vector_norm(x[rows] - x[others], p, dim=-1)
    return norms


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """A weight by its direction and length, and its norm, which stays in float32 for bfloat16."""
    others = [d for d in range(v.dim()) if d != dim]
    dtype, v = v.dtype, wide(v)
    norm = torch.linalg.vector_norm(v, 2, others, keepdim=True)
    weight: Tensor = v * (wide(g) / norm)
    kept = torch.float32 if g.dtype is torch.bfloat16 else g.dtype
    return weight.to(dtype), norm.to(kept)


def nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower of the two in the middle of what is a number; sorting puts NaN behind."""
    if not x.is_floating_point() or x.dim() == 0:
        return NotImplemented  # type: ignore[no-any-return]
    values, places = torch.sort(x, stable=True, dim=dim)
    count = x.isnan().logical_not().sum(dim, keepdim=True)
    middle = ((count - 1) // 2).clamp(min=0)
    found = values.gather(dim, middle), places.gather(dim, middle)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def nanmedian_of_all(x: Tensor) -> Tensor:
    """The same over all elements."""
    found = nanmedian(x.flatten(), 0)
    return found if found is NotImplemented else found[0]


def mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The end of the longest run of equal elements after sorting, the first of several."""
    if x.dim() == 0 or x.dtype is torch.bool:
        return NotImplemented  # type: ignore[no-any-return]
    values, places = torch.sort(x, stable=True, dim=dim)
    length = x.shape[dim]
    at = torch.arange(length, device=x.device).reshape([-1, *[1] * (x.dim() - dim % x.dim() - 1)])
    before = values.narrow(dim, 0, length - 1)
    begins = F.pad(
        (values.narrow(dim, 1, length - 1) != before).to(torch.int64).movedim(dim, -1), [1, 0]
    ).movedim(-1, dim)
    run = at - torch.cummax(begins * at, dim).values
    longest = run.argmax(dim, keepdim=True)
    found = values.gather(dim, longest), places.gather(dim, longest)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def power(self: torch.Tensor, exponent: Any) -> Any:
    """`x ** n` with n as it is: Inductor multiplies only where it knows a whole number."""
    if isinstance(exponent, torch.SymInt):
        return aten.pow.Tensor_Scalar(self, int(exponent))
    return NotImplemented


TABLE: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    **pooling.TABLE,
    **recurrent.TABLE,
    **log_softmax.TABLE,
    **interpolation.TABLE,
    aten.col2im.default: col2im,
    aten._trilinear.default: trilinear,
    aten._cdist_forward.default: cdist,
    aten._pdist_forward.default: pdist,
    aten.linalg_cross.default: cross,
    aten._weight_norm_interface.default: weight_norm,
    aten.nanmedian.dim: nanmedian,
    aten.nanmedian.default: nanmedian_of_all,
    aten.mode.default: mode,
    aten.pow.Tensor_Scalar: power,
}
