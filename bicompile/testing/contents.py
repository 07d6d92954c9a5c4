"""What tensors are filled with: contents that make an order of summation visible.

Sums in double that are rounded to float32 at their end hide their order from ordinary numbers;
large terms that cancel show it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Draw = Callable[[list[int], int | None, torch.Generator], torch.Tensor]


def _mixed(shape: list[int], axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """Mixed magnitudes, and exact zeros."""
    x = torch.randn(shape, generator=generator)
    scale = torch.exp(torch.randn(shape, generator=generator))
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x * scale)


def _wide(shape: list[int], axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """Magnitudes from 2^-30 to 2^30."""
    exponents = torch.randint(-30, 31, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), exponents)


def _cancelling(shape: list[int], axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """Along the axis a third are large, a third are their negatives, in any order."""
    x = _mixed(shape, axis, generator)
    if axis is None or shape[axis] < 3 or 0 in shape:
        return x
    n = shape[axis]
    large = torch.ldexp(x.narrow(axis, 0, n // 3), torch.tensor(40))
    x.narrow(axis, 0, n // 3).copy_(large)
    x.narrow(axis, n // 3, n // 3).copy_(-large)
    return x.index_select(axis, torch.randperm(n, generator=generator))


def _ties(shape: list[int], axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """Few different numbers, zeros of both signs among them."""
    x = torch.randint(-2, 3, shape, generator=generator).float()
    return torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0, x)


def _subnormal(shape: list[int], axis: int | None, generator: torch.Generator) -> torch.Tensor:
    """Around the least normal number of float32 and bfloat16."""
    return _mixed(shape, axis, generator) * 2.0**-126


CONTENTS: Mapping[str, Draw] = {
    "mixed": _mixed,
    "wide": _wide,
    "cancelling": _cancelling,
    "ties": _ties,
    "subnormal": _subnormal,
}
"""Name -> tensor in float32, of a shape, the axis that is summed over (or None) and a generator."""
