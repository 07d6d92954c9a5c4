"""Processes that judge operations and models: one that crashes or hangs takes no other along."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import Any

_TASKS = 60
"""A process is replaced after so many tasks: compiled code stays in its memory."""


def each(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    jobs: int,
    seconds: float,
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Call a function for each task in `jobs` processes, with a limit of `seconds`.

    Yields:
        a task and what was returned or raised for it, as they come; among what is raised is
        TimeoutError, and ProcessExpired where a process died.
    """
    from pebble import ProcessPool

    spawned = multiprocessing.get_context("spawn")
    with ProcessPool(jobs, _TASKS, initializer=_quiet, context=spawned) as pool:
        futures: dict[Any, tuple[Any, ...]] = {
            pool.schedule(function, args=t, timeout=seconds): t for t in tasks
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        except BaseException:  # nobody waits for the rest
            pool.stop()  # type: ignore[no-untyped-call]
            raise


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
