"""Schedules of the row kernels (reduce, softmax, norm): rows per program, warps. Free: no bits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rows per program, and its warps."""

    rows: int
    warps: int


@dataclass(frozen=True)
class Entry:
    """For blocks of up to `block` terms: one schedule for few rows, one for many."""

    block: int
    few: Schedule
    many: Schedule


FEW = 256

TABLE = (
    Entry(16, Schedule(16, 1), Schedule(128, 4)),
    Entry(64, Schedule(4, 1), Schedule(32, 4)),
    Entry(256, Schedule(1, 1), Schedule(8, 4)),
    Entry(1024, Schedule(1, 2), Schedule(2, 2)),
    Entry(2048, Schedule(1, 4), Schedule(1, 2)),
    Entry(4096, Schedule(1, 4), Schedule(1, 2)),
)

#: Rows of more than one block: the warps hide the latency of the loop.
LONG = Entry(0, Schedule(1, 8), Schedule(1, 4))


def schedule(rows: int, k: int, block: int) -> Schedule:
    """The schedule for `rows` rows of k terms in blocks of `block`."""
    entry = LONG if k > block else next(e for e in TABLE if block <= e.block)
    return entry.few if rows <= FEW else entry.many


def schedules(k: int, block: int) -> tuple[Schedule, ...]:
    """Every schedule that may serve rows of k terms (one bit class)."""
    if k > block:
        return LONG.few, LONG.many, Schedule(2, 8)
    return tuple(s for e in TABLE if block <= e.block for s in (e.few, e.many))[:4]
