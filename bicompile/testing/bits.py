"""Tensors compared bit by bit: the only comparison that the properties know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class InvarianceViolation(AssertionError):
    """Two runs that must agree bit for bit do not; `example` is the case, if a search found it."""

    example: Mapping[str, Any] | None = None


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor as integers; every NaN counts as the same."""
    x = x.detach().contiguous()
    pattern = x.view(_INTEGER[x.element_size()])
    if x.dtype.is_floating_point:
        pattern = pattern.masked_fill(x.isnan(), -1)
    return pattern


def assert_same_bits(actual: Any, expected: Any, what: str) -> None:
    """Compare tensors, or tuples of tensors, bit by bit.

    Raises:
        InvarianceViolation: with the index and both bit patterns of the first difference.
    """
    pairs = zip(outputs(actual), outputs(expected), strict=True)
    for number, (a, e) in enumerate(pairs):
        if a.shape != e.shape or a.dtype is not e.dtype:
            raise InvarianceViolation(f"{what}: {a.dtype}{[*a.shape]} is not {e.dtype}{[*e.shape]}")
        different = (bits(a) != bits(e)).nonzero()
        if len(different):
            at = tuple(different[0].tolist())
            mask = (1 << 8 * a.element_size()) - 1
            left, right = (
                f"{int(bits(t)[at].item()) & mask:#x} ({t[at].item():.9g})" for t in (a, e)
            )
            raise InvarianceViolation(
                f"{what}: {len(different)} of {a.numel()} elements of output {number} differ; "
                f"first at {[*at]}: {left} is not {right}"
            )


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    """One tensor or several as a tuple."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def pattern(x: torch.Tensor) -> str:
    """The bits of one number in hex."""
    size = x.element_size()
    return f"{_integer(x) & ((1 << 8 * size) - 1):#0{2 + 2 * size}x}"


def _integer(x: torch.Tensor) -> int:
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return int(x.reshape(1).contiguous().view(kinds[x.element_size()]).item())


def ulps(x: torch.Tensor, y: torch.Tensor) -> int:
    """How many representable numbers lie from one number to the other.

    Example:
        >>> ulps(torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
        1
    """
    if not x.dtype.is_floating_point:
        return abs(int(x) - int(y))
    # Negative numbers count downwards from zero.
    a, b = (
        n if (n := _integer(t)) >= 0 else -(n + (1 << 8 * t.element_size() - 1)) for t in (x, y)
    )
    return abs(a - b)
