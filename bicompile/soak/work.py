"""Processes that run blocks of cases; one that dies takes a block along, which is found by then."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from bicompile.soak import subjects
from bicompile.soak.state import Block, Failure

OF_OPS, OF_MODELS = 64, 4
"""Cases of a block."""
EVERY = 16
"""Of so many rounds over the ops, one is over the models, too: a case of theirs takes longer."""
SECONDS = 1800.0
"""After which a block is given up."""


def numbers(subject: str, block: int) -> range:
    """The numbers of the cases of a block."""
    size = OF_MODELS if subject in subjects.MODELS else OF_OPS
    return range(block * size, (block + 1) * size)


def endless(names: Sequence[str], done: Mapping[str, set[int]]) -> Iterator[tuple[str, int]]:
    """Blocks that are not done, subject after subject, round after round."""
    models = [name for name in names if name in subjects.MODELS]
    others = [name for name in names if name not in subjects.MODELS]
    for turn in itertools.count():
        waiting = [(name, turn) for name in others]
        if not others or turn % EVERY == 0:
            waiting += [(name, turn // EVERY if others else turn) for name in models]
        yield from (task for task in waiting if task[1] not in done.get(task[0], ()))


def run_block(subject: str, block: int, device: str) -> Block:
    """Run the cases of a block."""
    start = time.perf_counter()
    laws: Counter[str] = Counter()
    failures = []
    for number in numbers(subject, block):
        law, message = subjects.check(subject, number, device)
        laws[law] += 1
        if message:
            failures.append(Failure(subject, number, law, message))
    return Block(subject, block, laws, time.perf_counter() - start, tuple(failures))


def each(
    tasks: Iterable[tuple[str, int]], *, device: str, jobs: int, modules: Sequence[str], end: float
) -> Generator[Block]:
    """Run blocks in `jobs` processes, as they come, until `end` (of `time.perf_counter`).

    On GPUs, the processes take them in turn.

    Closing the generator ends the processes; what is not whole by then is not there.
    """
    from pebble import ProcessPool

    context = multiprocessing.get_context("spawn")
    tasks = iter(tasks)
    begun = (device, modules, context.Value("i", 0))
    with ProcessPool(jobs, 0, initializer=_begin, initargs=begun, context=context) as pool:
        running: dict[Any, tuple[str, int]] = {}
        try:
            while True:
                for task in itertools.islice(tasks, 2 * jobs - len(running)):
                    future: Any = pool.schedule(run_block, args=(*task, device), timeout=SECONDS)
                    running[future] = task
                if not running:
                    return
                left = max(end - time.perf_counter(), 0)
                timeout = None if math.isinf(end) else left
                finished, _ = wait(running, timeout, FIRST_COMPLETED)
                if not finished:
                    return
                for future in finished:
                    task = running.pop(future)
                    yield _lost(task, future.exception()) or future.result()
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


def _lost(task: tuple[str, int], error: BaseException | None) -> Block | None:
    """What is written down of a block whose process died or did not end."""
    if error is None:
        return None
    subject, block = task
    first, last = numbers(subject, block)[0], numbers(subject, block)[-1]
    message = (
        f"{type(error).__name__}: {error}\n"
        f"one of the cases {first} to {last}: bicompile soak --case '{subject}@NUMBER'"
    )
    law = "the process lives"
    return Block(subject, block, {law: 1}, 0.0, (Failure(subject, first, law, message),))


def _begin(device: str, modules: Sequence[str], begun: Any) -> None:
    """Make a process ready; `begun` counts them, for the GPUs to be shared out."""
    import torch

    with begun.get_lock():
        place, begun.value = begun.value, begun.value + 1
    if device == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    subjects.ops(modules)
