"""Pooling and its gradients, opened before our passes see them into what is pointwise or a sum.

An average of windows, `aten.avg_pool2d(x, [3, 3], [2, 2], [1, 1])`, is, axis by axis from the last
on, each window from its first element on::

    %p = aten.constant_pad_nd(%x, [1, 1, 1, 1])
    %w = aten.unfold(%p, -1, 3, 2)
    %s = aten.select(%w, -1, 0) + aten.select(%w, -1, 1) + aten.select(%w, -1, 2)
    ...
    %y = %s / 9

A window of more than `LONG` elements is a sum of ours.  Half types are added in float32 and rounded
once.  What goes back through sums of windows are sums of windows, over gradients that lie as far
apart as the windows; what goes back through a maximum is written, or added, to where that was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
LONG = 64  # pinned: from here on a window is summed by a kernel


def wide(x: Tensor) -> Tensor:
    """Half types in float32, which sums are added in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def apart(x: Tensor, dim: int, step: int, at: int, length: int) -> Tensor:
    """Zeros of a length along an axis, with the elements of x at `at`, `at + step`, ..."""
    spread = F.pad(x.unsqueeze(dim), [*[0, 0] * (-dim - 1), 0, step - 1]).flatten(dim - 1, dim)
    behind = length - at - spread.shape[dim]
    return F.pad(spread, [*[0, 0] * (-dim - 1), at, behind])


def _each(given: Sequence[int], rank: int) -> list[int]:
    """One number for each axis, of one for all."""
    return list(given) if len(given) == rank else list(given) * rank


def _add(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _window_sums(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Sums of `size` elements along an axis, at every `step`."""
    windows = x.unfold(dim, size, step)
    if size > LONG:
        return windows.sum(-1)
    return _add([windows.select(-1, i) for i in range(size)])


def _along(x: Tensor, numbers: Tensor, dim: int) -> Tensor:
    """Numbers of an axis (counted from the end), to be combined with the elements of x."""
    return numbers.to(x.dtype).reshape([-1, *[1] * (-dim - 1)])


_Windows = Sequence[tuple[int, int, int, int, int]]


def _windows(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    rank: int,
) -> _Windows:
    """Of each axis, the last one first: itself, size, step and padding of its windows.

    And how far the last window reaches beyond the padding.
    """
    sizes, pads = _each(kernel_size, rank), _each(padding, rank)
    steps = _each(stride, rank) if stride else sizes
    found = []
    for dim in range(-1, -rank - 1, -1):
        size, step, pad = sizes[dim], steps[dim], pads[dim]
        extra = 0
        if ceil_mode:
            length = int(x.shape[dim])
            count = -((size - length - 2 * pad) // step) + 1
            count -= (count - 1) * step >= length + pad
            extra = max((count - 1) * step + size - length - 2 * pad, 0)
        found.append((dim, size, step, pad, extra))
    return found


def _divisor(
    x: Tensor, sums: Tensor, windows: _Windows, with_padding: bool, instead: int | None
) -> Any:
    """What the sums of windows are divided by."""
    if instead is not None:
        return instead
    each: list[Any] = []
    for dim, size, step, pad, extra in windows:
        if (pad and not with_padding) or extra:
            present = _present(x, sums, dim, size, step, pad, with_padding)
            each.append(_along(sums, present, dim))
        else:
            each.append(size)
    return _product(each)


def avg_pool(rank: int) -> Callable[..., Tensor]:
    """`aten.avg_pool{rank}d`."""

    def decompose(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        if not x.is_floating_point():
            return NotImplemented  # type: ignore[no-any-return]
        windows = _windows(x, kernel_size, stride, padding, ceil_mode, rank)
        total = wide(x)
        for dim, size, step, pad, extra in windows:
            if pad or extra:
                total = F.pad(total, [*[0, 0] * (-dim - 1), pad, pad + extra])
            total = _window_sums(total, dim, size, step)
        mean: Tensor = total / _divisor(x, total, windows, count_include_pad, divisor_override)
        return mean.to(x.dtype)

    return decompose


def avg_pool_backward(rank: int) -> Callable[..., Tensor]:
    """`aten.avg_pool{rank}d_backward`: each element is in all windows that reach it."""

    def decompose(
        grad_output: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        windows = _windows(x, kernel_size, stride, padding, ceil_mode, rank)
        total = wide(grad_output)
        total = total / _divisor(x, total, windows, count_include_pad, divisor_override)
        for dim, size, step, pad, _ in windows:
            total = apart(total, dim, step, size - 1 - pad, x.shape[dim] + size - 1)
            total = _window_sums(total, dim, size, 1)
        return total.to(x.dtype)

    return decompose


def _present(
    x: Tensor, sums: Tensor, dim: int, size: int, step: int, pad: int, with_padding: bool
) -> Tensor:
    """How many elements each window along an axis has."""
    length, margin = x.shape[dim], pad if with_padding else 0
    start = torch.arange(sums.shape[dim], device=x.device) * step - pad
    return (start + size).clamp(max=length + margin) - start.clamp(min=-margin)


def _product(numbers: Sequence[Any]) -> Any:
    product = numbers[0]
    for number in numbers[1:]:
        product = product * number
    return product


def _adaptive(length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Where windows begin and end, and the length of the longest.

    Window i of n begins at i * S // n and ends at ceil((i + 1) * S / n).
    """
    i = torch.arange(count, device=device)
    start, stop = i * length // count, ((i + 1) * length + count - 1) // count
    lengths = (-(-(n + 1) * length // count) - n * length // count for n in range(count))
    return start, stop, max(lengths)


def _adaptive_sums(x: Tensor, dim: int, count: int) -> Tensor:
    """Sums of `count` windows along an axis."""
    length = int(x.shape[dim])
    if length % count == 0:
        return _window_sums(x, dim, length // count, length // count)
    start, stop, longest = _adaptive(length, count, x.device)
    terms = []
    for place in range(longest):
        term = x.index_select(dim, (start + place).clamp(max=length - 1))
        inside = (start + place < stop).reshape([-1, *[1] * (-dim - 1)])
        terms.append(torch.where(inside, term, 0.0))
    return _add(terms) if longest <= LONG else torch.stack(terms, -1).sum(-1)


def _adaptive_divisor(x: Tensor, sums: Tensor, rank: int) -> Any:
    """How many elements each window has."""
    each: list[Any] = []
    for dim in range(-1, -rank - 1, -1):
        length, count = int(x.shape[dim]), int(sums.shape[dim])
        if length % count == 0:
            each.append(length // count)
        else:
            start, stop, _ = _adaptive(length, count, x.device)
            each.append(_along(sums, stop - start, dim))
    return _product(each)


def adaptive_avg_pool(rank: int) -> Callable[..., Tensor]:
    """`aten._adaptive_avg_pool{rank}d`."""

    def decompose(x: Tensor, output_size: Sequence[int]) -> Tensor:
        if not x.is_floating_point():
            return NotImplemented  # type: ignore[no-any-return]
        if 0 in output_size:
            return x.new_empty([*x.shape[:-rank], *output_size])
        total = wide(x)
        for dim in range(-1, -rank - 1, -1):
            total = _adaptive_sums(total, dim, int(output_size[dim]))
        mean: Tensor = total / _adaptive_divisor(x, total, rank)
        return mean.to(x.dtype)

    return decompose


def adaptive_max_pool(rank: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """`aten.adaptive_max_pool{rank}d`: of the same windows; of equal elements the first counts."""

    def decompose(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        top, found = x, torch.zeros_like(x, dtype=torch.int64)
        if 0 in output_size:
            shape = [*x.shape[:-rank], *output_size]
            return top.new_empty(shape), found.new_empty(shape)
        stride = 1  # of this axis in the numbers of the elements
        for dim in range(-1, -rank - 1, -1):
            length, count = int(x.shape[dim]), int(output_size[dim])
            start, stop, longest = _adaptive(length, count, x.device)
            windows, numbers = top, found
            for place in range(longest):
                at = (start + place).minimum(stop - 1)  # the last once more changes nothing
                value = windows.index_select(dim, at)
                number = numbers.index_select(dim, at)
                number = number + (at * stride).reshape([-1, *[1] * (-dim - 1)])
                better = (value > top) | value.isnan() if place else None
                top = value if better is None else value.where(better, top)
                found = number if better is None else number.where(better, found)
            stride *= length
        return top, found

    return decompose


def adaptive_avg_pool_backward(rank: int) -> Callable[..., Tensor]:
    """`aten._adaptive_avg_pool{rank}d_backward`.

    Element j of S is in the windows j * n // S to ceil((j + 1) * n / S) of n: a window of theirs.
    """

    def decompose(grad_output: Tensor, x: Tensor) -> Tensor:
        if 0 in grad_output.shape[-rank:]:
            return torch.zeros_like(x)
        total = wide(grad_output)
        total = total / _adaptive_divisor(x, total, rank)
        for dim in range(-1, -rank - 1, -1):
            total = _adaptive_sums(total, dim, int(x.shape[dim]))
        return total.to(x.dtype)

    return decompose


def max_pool_backward(rank: int) -> Callable[..., Tensor]:
    """`aten.max_pool{rank}d_with_indices_backward`."""

    def decompose(
        grad_output: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        indices: Tensor,
    ) -> Tensor:
        sizes, taps = _each(kernel_size, rank), _each(dilation, rank)
        steps = _each(stride, rank) if stride else sizes
        reach = (d * (k - 1) + 1 for k, d in zip(sizes, taps, strict=True))
        overlap = any(r > s for r, s in zip(reach, steps, strict=True))
        return _to_maxima(grad_output, x, indices, rank, overlap)

    return decompose


def adaptive_max_pool_backward(rank: int) -> Callable[..., Tensor]:
    """`aten.adaptive_max_pool{rank}d_backward`."""

    def decompose(grad_output: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        sizes = zip(x.shape[-rank:], grad_output.shape[-rank:], strict=True)
        overlap = any(int(length) % max(int(count), 1) for length, count in sizes)
        return _to_maxima(grad_output, x, indices, rank, overlap)

    return decompose


def _to_maxima(grad: Tensor, x: Tensor, indices: Tensor, rank: int, overlap: bool) -> Tensor:
    """Gradients where the maxima were; if windows overlap, sums of ours in their order."""
    image = grad.new_zeros(x.shape).flatten(-rank)
    places, grad = indices.flatten(-rank), grad.flatten(-rank)
    found = image.scatter_add(-1, places, grad) if overlap else image.scatter(-1, places, grad)
    return found.view(x.shape)


TABLE: Mapping[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.avg_pool2d.default: avg_pool(2),
    aten.avg_pool3d.default: avg_pool(3),
    aten.avg_pool2d_backward.default: avg_pool_backward(2),
    aten.avg_pool3d_backward.default: avg_pool_backward(3),
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool(2),
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool(3),
    aten.adaptive_max_pool2d.default: adaptive_max_pool(2),
    aten.adaptive_max_pool3d.default: adaptive_max_pool(3),
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool_backward(3),
    aten.max_pool2d_with_indices_backward.default: max_pool_backward(2),
    aten.max_pool3d_with_indices_backward.default: max_pool_backward(3),
    aten.adaptive_max_pool2d_backward.default: adaptive_max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: adaptive_max_pool_backward(3),
}
