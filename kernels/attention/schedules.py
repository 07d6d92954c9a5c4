"""Schedules of the Triton attention: rows per tile, warps and stages. Free: they change no bit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Rows of a tile, warps, pipeline stages, and a limit on registers (0: none)."""

    rows: int
    warps: int
    stages: int
    registers: int = 0


#: (bytes per element, largest padded head size) -> (few rows, many rows); within 99 KB.
TABLE = {
    (2, 64): (Schedule(16, 4, 3), Schedule(64, 4, 3)),
    (2, 128): (Schedule(16, 4, 2), Schedule(64, 4, 2)),
    (2, 256): (Schedule(16, 4, 1), Schedule(64, 8, 1)),
    (4, 64): (Schedule(16, 4, 2), Schedule(32, 4, 2)),
    (4, 128): (Schedule(16, 4, 1), Schedule(32, 4, 1)),
    (4, 256): (Schedule(16, 8, 1), Schedule(16, 8, 1)),
}

FEW = 16  # rows (queries x heads of a group) served by the first schedule
PROGRAMS = 264  # fewer programs than this leave the device idle: split the keys
SCRATCH = 64 << 20  # bytes that a split may take


def _entry(size: int, head: int) -> tuple[Schedule, Schedule]:
    """The pair for elements of `size` bytes and a padded head size; beyond the table, its last."""
    return TABLE.get((size, max(head, 64)), TABLE[size, 256])


def schedule(size: int, head: int, rows: int) -> Schedule:
    """The schedule for a group of `rows` rows."""
    few, many = _entry(size, head)
    return few if rows <= FEW else many


def splits(tiles: int, chunks: int, scratch: int) -> bool:
    """Whether each chunk of keys gets a program of its own."""
    return chunks > 1 and tiles < PROGRAMS and scratch <= SCRATCH


def schedules(size: int, head: int) -> tuple[Schedule, ...]:
    """Every schedule of a size (one bit class)."""
    return tuple(dict.fromkeys(_entry(size, head)))
