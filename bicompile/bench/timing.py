"""Clocks: the fastest of single calls, a loop of steps, a CUDA graph of calls; memory and bits."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch

from bicompile.answers import digests

Call = Callable[[], Any]
_HASHED_AT_ONCE = 1 << 27
_REPLAYS = 3


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(call: Call) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def fastest(calls: Iterable[Call]) -> float:
    """Seconds of the fastest call; the first warms up and is left out."""
    return min(itertools.islice(map(elapsed, calls), 1, None))


def per_step(steps: Sequence[Call]) -> float:
    """Seconds of a step where the steps follow each other without waiting for the GPU."""

    def run() -> None:
        for step in steps:
            step()

    return elapsed(run) / len(steps)


class Graph:
    """Calls recorded in one CUDA graph, so that the time is the GPU's alone.

    Args:
        calls: run in this order; give each other inputs so that none finds them in the L2 cache.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls  # the graph reads their inputs, so they must stay
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # whatever they load or compile cannot be recorded
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def seconds(self) -> float:
        """Seconds of one call, in the fastest of a few replays."""
        best = float("inf")
        for _ in range(_REPLAYS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return best / len(self.calls)


def copies_beyond_cache(inputs: Sequence[torch.Tensor], most: int = 64) -> list[list[torch.Tensor]]:
    """The inputs, as many times as it takes to be thrice the size of the GPU's L2 cache.

    Small inputs stay in the cache all the same: in a model they have just been written.
    """
    size = sum(t.numel() * t.element_size() for t in inputs)
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    count = min(most, -(-3 * cache // size))
    return [list(inputs), *([deepcopy(t) for t in inputs] for _ in range(count - 1))]


def row_digests(rows: torch.Tensor) -> list[str]:
    """A digest of the bits of each row, made where the tensor is."""
    flat = rows.detach().flatten(1)
    at_once = max(1, _HASHED_AT_ONCE // flat.shape[1])
    return [
        name for part in flat.split(at_once) for (name,) in digests([part], range(part.shape[0]))
    ]


def peak_memory() -> float:
    """Most memory this process held, in MB: the GPU's since `forget_peak`, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def forget_peak() -> None:
    """Give unused memory of the GPU back, and count its peak anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
