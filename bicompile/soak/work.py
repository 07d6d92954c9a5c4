"""Blocks of cases and how they are run; a process that dies takes one along, which is told."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

from bicompile import pool
from bicompile.soak import subjects
from bicompile.soak.state import Block, Failure

OF_MODELS = 4
"""Cases of a block of a model."""
EVERY = {"cpu": 16, "cuda": 64}
"""Of so many rounds over the ops, one is over the models, too: a case of theirs takes longer."""
SECONDS = 1800.0
"""After which a block is given up."""


def numbers(subject: str, block: int, device: str) -> range:
    """The numbers of the cases of a block."""
    size = OF_MODELS if subject in subjects.MODELS else subjects.OF_OPS[device]
    return range(block * size, (block + 1) * size)


def endless(
    names: Sequence[str], done: Mapping[str, set[int]], device: str
) -> Iterator[tuple[str, int]]:
    """Blocks that are not done, subject after subject, round after round."""
    every = EVERY[device]
    models = [name for name in names if name in subjects.MODELS]
    others = [name for name in names if name not in subjects.MODELS]
    for turn in itertools.count():
        waiting = [(name, turn) for name in others]
        if not others or turn % every == 0:
            waiting += [(name, turn // every if others else turn) for name in models]
        yield from (task for task in waiting if task[1] not in done.get(task[0], ()))


def run_block(subject: str, block: int, device: str) -> Block:
    """Run the cases of a block."""
    start = time.perf_counter()
    laws: Counter[str] = Counter()
    failures = []
    for number in numbers(subject, block, device):
        law, message = subjects.check(subject, number, device)
        laws[law] += 1
        if message:
            failures.append(Failure(subject, number, law, message))
            if pool.gpu_is_lost():  # nothing more can be found out here
                break
    return Block(subject, block, laws, time.perf_counter() - start, tuple(failures))


def each(
    tasks: Iterable[tuple[str, int]], *, device: str, jobs: int, modules: Sequence[str], end: float
) -> Generator[Block]:
    """Run blocks in `jobs` processes, as they come, until `end` (of `time.perf_counter`).

    Closing the generator ends the processes; what is not whole by then is not there.
    """
    for (subject, block, _), found in pool.each(
        run_block,
        ((*task, device) for task in tasks),
        jobs=jobs,
        seconds=SECONDS,
        device=device,
        begin=functools.partial(_begin, modules),
        end=end,
    ):
        lost = isinstance(found, BaseException)
        yield _lost(subject, block, device, found) if lost else found


def _lost(subject: str, block: int, device: str, error: BaseException) -> Block:
    """What is written down of a block whose process died or did not end."""
    first, last = (numbers(subject, block, device)[n] for n in (0, -1))
    message = (
        f"{type(error).__name__}: {error}\n"
        f"one of the cases {first} to {last}: bicompile soak --device {device} "
        f"--case '{subject}@NUMBER'"
    )
    law = "the process lives"
    return Block(subject, block, {law: 1}, 0.0, (Failure(subject, first, law, message),))


def _begin(modules: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)
    subjects.ops(modules)
