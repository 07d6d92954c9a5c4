"""Schedules of the Triton convolution: tiles, warps, stages, parts apart or not. Free: no bits.

A table is read from the top; the first entry whose bounds hold serves.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bicompile.certificate import choose


@dataclass(frozen=True)
class Schedule:
    """Tile of the output, step in K, warps and pipeline stages.

    `apart`: each part of a sum is a program of its own, and a second kernel adds the parts.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    apart: bool = False


@dataclass(frozen=True)
class Entry:
    """A schedule for up to `size` outputs, and up to `n` channels of a group."""

    size: int
    n: int
    schedule: Schedule


MANY = 1 << 62

TABLE: dict[str, tuple[Entry, ...]] = {
    "half": (
        Entry(MANY, 16, Schedule(128, 16, 64, 4, 4)),
        Entry(1 << 16, MANY, Schedule(64, 32, 128, 4, 3, True)),
        Entry(1 << 20, MANY, Schedule(64, 64, 128, 4, 3, True)),
        Entry(MANY, 64, Schedule(128, 64, 64, 4, 3)),
        Entry(1 << 22, MANY, Schedule(128, 128, 64, 8, 3, True)),
        Entry(MANY, MANY, Schedule(128, 128, 64, 8, 4)),
    ),
    "tf32": (
        Entry(1 << 20, MANY, Schedule(64, 32, 32, 4, 4, True)),
        Entry(MANY, MANY, Schedule(64, 64, 32, 4, 3)),
    ),
    "double": (
        Entry(1 << 20, MANY, Schedule(32, 32, 32, 4, 3, True)),
        Entry(MANY, MANY, Schedule(64, 64, 32, 4, 3)),
    ),
    "ieee": (
        Entry(1 << 20, MANY, Schedule(32, 32, 32, 4, 3, True)),
        Entry(MANY, MANY, Schedule(64, 32, 32, 4, 3)),
    ),
}

#: kind -> the schedule that serves any size: used where the others are not certified.
SINGLE = {
    "half": Schedule(128, 64, 64, 4, 3),
    "tf32": Schedule(64, 64, 32, 4, 3),
    "double": Schedule(64, 64, 32, 4, 3),
    "ieee": Schedule(64, 32, 32, 4, 3),
}


def schedule(kind: str, size: int, n: int) -> Schedule:
    """The schedule for so many outputs, of n channels of a group."""
    return choose("convolution", kind, wanted(kind, size, n), SINGLE[kind], lambda: schedules(kind))


@functools.cache
def wanted(kind: str, size: int, n: int) -> Schedule:
    """What the table says, certified or not."""
    return next(e.schedule for e in TABLE[kind] if size <= e.size and n <= e.n)


def schedules(kind: str) -> tuple[Schedule, ...]:
    """Every schedule of a kind (one bit class), the single one first."""
    return tuple(dict.fromkeys((SINGLE[kind], *(e.schedule for e in TABLE[kind]))))
