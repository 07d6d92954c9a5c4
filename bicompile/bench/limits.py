"""The physical limit: what this very machine reads and multiplies per second, and what that costs.

A model step cannot take less than the sum over its matmuls and attentions of the larger of two
times: that of the bytes that must move (weights, visible keys and values, each once, at the
measured bandwidth) and that of the operations (at the measured rate of a large matmul).
Activations are not counted, since a perfect fusion would keep them on the chip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bicompile.bench import timing
from bicompile.bench.cases import Case, Shapes
from bicompile.bench.systems import dtype_named

_CALLS = 10


class Limits:
    """Measures the machine."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.dtype = dtype_named(dtype)

    def measure(self, copied: int, size: int) -> dict[str, float]:
        """Bytes per second of a sum or a copy, operations per second of a matmul.

        A step mostly reads, and a GPU reads faster than it reads and writes.

        Args:
            copied: bytes of the source.
            size: M = N = K of the matmul, 2 M N K operations.
        """
        source = torch.ones(copied // 4, device=self.device)
        target, total = torch.empty_like(source), torch.empty((), device=self.device)
        x = torch.randn(size, size, device=self.device).to(self.dtype)
        y = torch.empty_like(x)
        return {
            "bytes": max(
                copied / self._seconds(lambda: torch.sum(source, (0,), out=total)),
                2 * copied / self._seconds(lambda: target.copy_(source)),
            ),
            "operations": 2 * size**3 / self._seconds(lambda: torch.mm(x, x, out=y)),
        }

    def _seconds(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda":
            return timing.Graph([call] * _CALLS).seconds()
        return timing.fastest([call] * (_CALLS + 1))


def least_seconds(
    case: Case, shapes: Shapes, bytes_per_element: int, rates: Mapping[str, float]
) -> float:
    """The limit of a model's case.

    Args:
        case: `decode T` or `prefill T`, with its batch.
        shapes: of the model.
        bytes_per_element: of weights, keys and values.
        rates: as `Limits.measure` returns them.

    Example:
        >>> rates = {"bytes": 3e12, "operations": 8e14}
        >>> f"{least_seconds(Case('decode 1024', 1), Shapes(), 2, rates) * 1e3:.2f} ms"
        '1.45 ms'
    """
    moved, done = rates["bytes"] / bytes_per_element, rates["operations"]
    return math.fsum(max(n / moved, ops / done) for n, ops in _parts(case, shapes))


def _parts(case: Case, shapes: Shapes) -> Iterator[tuple[int, int]]:
    """Elements that must be read, and operations, of each matmul and attention of a step."""
    (length,) = case.sizes
    queries = 1 if case.kind == "decode" else length
    tokens = case.batch * queries
    # Query i of a prefill sees i + 1 keys; the one of a decode step sees the context and itself.
    seen = length + 1 if case.kind == "decode" else math.comb(length + 1, 2)
    width = shapes.heads * shapes.head_size
    keys = length + 1 if case.kind == "decode" else length
    for _ in range(shapes.layers):
        for k, n in shapes.matmuls.values():
            yield k * n, 2 * tokens * k * n
        cached = 2 * case.batch * keys * shapes.kv_heads * shapes.head_size
        yield cached, 4 * case.batch * seen * width
    head = shapes.hidden * shapes.vocabulary
    yield head, 2 * case.batch * head
