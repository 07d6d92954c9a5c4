"""Schedules of the Triton matmul: tiles, warps and stages by kind and rows. Free: no bits.

Every entry fits 99 KB of shared memory (sm_80 and later).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Tile of the output, step in K, warps and pipeline stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


PART = 32  # pinned: terms of one chain of an "ieee" matmul, so its bk

#: kind -> ((largest M, schedule), ...)
TABLE = {
    "half": (
        (16, Schedule(16, 32, 256, 4, 4)),
        (32, Schedule(32, 32, 128, 4, 4)),
        (64, Schedule(64, 32, 128, 4, 4)),
        (256, Schedule(64, 64, 128, 4, 3)),
        (1024, Schedule(128, 64, 64, 4, 4)),
        (1 << 62, Schedule(128, 128, 64, 8, 3)),
    ),
    "tf32": (
        (16, Schedule(16, 16, 128, 2, 4)),
        (64, Schedule(64, 32, 64, 4, 4)),
        (256, Schedule(64, 64, 32, 4, 4)),
        (1 << 62, Schedule(128, 128, 32, 4, 3)),
    ),
    "ieee": (
        (1, Schedule(1, 32, 32, 1, 6)),
        (8, Schedule(4, 32, 32, 2, 5)),
        (128, Schedule(16, 32, 32, 2, 5)),
        (1024, Schedule(64, 64, 32, 4, 3)),
        (1 << 62, Schedule(128, 128, 32, 8, 3)),
    ),
}


def schedule(kind: str, m: int) -> Schedule:
    """The schedule for m rows."""
    return next(s for top, s in TABLE[kind] if m <= top)


def schedules(kind: str) -> tuple[Schedule, ...]:
    """Every schedule of a kind (one bit class)."""
    return tuple(s for _, s in TABLE[kind])
