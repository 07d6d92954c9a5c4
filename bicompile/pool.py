"""Tasks shared out to processes: one that crashes, hangs or loses its GPU takes no other along."""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import pickle
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

LOST = 75
"""Exit status of a process that can no longer use its GPU, because a kernel failed there."""

Task = tuple[Any, ...]


def each(
    function: Callable[..., Any],
    tasks: Iterable[Task],
    *,
    jobs: int,
    seconds: float,
    most: int = 0,
    device: str = "cpu",
    begin: Callable[[], None] | None = None,
    end: float = math.inf,
) -> Generator[tuple[Task, Any]]:
    """Call a function with each task in `jobs` processes; GPUs are taken in turn.

    Closing the generator ends the processes.

    Args:
        function: what is called.
        tasks: its arguments, drawn as they are needed.
        jobs: the number of processes.
        seconds: after which a task is given up.
        most: a process is replaced after so many tasks; 0: never.
        device: "cpu" or "cuda".
        begin: what each process does first.
        end: of `time.perf_counter`, after which no task is waited for.

    Yields:
        a task and what was returned or raised for it, as they come; among what is raised is
        TimeoutError, and ProcessExpired where a process died.
    """
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("spawn")
    begun = context.Value("i", 0)
    tasks, again = iter(tasks), list[Task]()
    with ProcessPool(
        jobs, most, initializer=_begin, initargs=(device, begun, begin), context=context
    ) as pool:
        running: dict[Any, Task] = {}
        try:
            while True:
                waiting = itertools.chain(again, tasks)
                for task in itertools.islice(waiting, 2 * jobs - len(running)):
                    future: Any = pool.schedule(_call, args=(function, *task), timeout=seconds)
                    running[future] = task
                again = []
                if not running:
                    return
                timeout = None if math.isinf(end) else max(end - time.perf_counter(), 0)
                finished, _ = wait(running, timeout, FIRST_COMPLETED)
                if not finished:
                    return
                for future in finished:
                    task, error = running.pop(future), future.exception()
                    if isinstance(error, ProcessExpired) and error.exitcode == LOST:
                        again.append(task)  # it was not begun
                    else:
                        yield task, error or future.result()
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


def take_a_gpu(begun: Any) -> None:
    """Give this process one of the GPUs that are like the first; `begun` counts the processes."""
    import torch

    with begun.get_lock():
        place, begun.value = begun.value, begun.value + 1
    name = torch.cuda.get_device_name
    alike = [i for i in range(torch.cuda.device_count()) if name(i) == name(0)]
    torch.cuda.set_device(alike[place % len(alike)])


def gpu_is_lost() -> bool:
    """Whether a kernel failed in this process such that all that follow fail, too."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _call(function: Callable[..., Any], *task: Any) -> Any:
    if gpu_is_lost():
        os._exit(LOST)
    try:
        return function(*task)
    except Exception as error:
        if _travels(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _travels(error: Exception) -> bool:
    """Whether another process can be told of it as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _begin(device: str, begun: Any, begin: Callable[[], None] | None) -> None:
    """Make a process ready; `begun` counts those with a GPU."""
    if device == "cuda":
        take_a_gpu(begun)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if begin:
        begin()
