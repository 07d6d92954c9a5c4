"""Schedules of the Triton attention: rows per tile, warps and stages. Free: they change no bit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rows of a tile, warps, pipeline stages, and a limit on registers (0: none)."""

    rows: int
    warps: int
    stages: int
    registers: int = 0


#: (bytes per element, largest padded head size) -> schedules in rising order of rows; all within
#: 99 KB of shared memory (sm_80 and later).
TABLE = {
    (2, 64): (Schedule(16, 4, 3), Schedule(64, 4, 3), Schedule(128, 8, 3)),
    (2, 128): (Schedule(16, 4, 3), Schedule(64, 4, 2), Schedule(128, 8, 2)),
    (2, 256): (Schedule(16, 4, 1), Schedule(64, 8, 1)),
    (4, 64): (Schedule(16, 4, 2), Schedule(32, 4, 2)),
    (4, 128): (Schedule(16, 4, 1), Schedule(32, 4, 1)),
    (4, 256): (Schedule(16, 8, 1),),
}

PROGRAMS = 264  # fewer programs than this leave the device idle: split the keys
SCRATCH = 64 << 20  # bytes that a split may take


def schedules(size: int, head: int) -> tuple[Schedule, ...]:
    """Every schedule for elements of `size` bytes and a padded head size (one bit class)."""
    return TABLE.get((size, max(head, 64)), TABLE[size, 256])


def schedule(size: int, head: int, rows: int) -> Schedule:
    """The smallest tile that holds a group of `rows` rows, else the largest tile."""
    entry = schedules(size, head)
    return next((s for s in entry if rows <= s.rows), entry[-1])


def splits(tiles: int, chunks: int, scratch: int) -> bool:
    """Whether each chunk of keys gets a program of its own."""
    return chunks > 1 and tiles < PROGRAMS and scratch <= SCRATCH
