"""Schedules of the Triton attention: rows per tile, warps and stages. Free: they change no bit."""

from dataclasses import dataclass

from bicompile.certificate import choose


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

#: The same keys -> the schedule that serves any number of rows: used where the others are not
#: certified.
SINGLE = {
    (2, 64): Schedule(64, 4, 3),
    (2, 128): Schedule(64, 4, 2),
    (2, 256): Schedule(64, 8, 1),
    (4, 64): Schedule(32, 4, 2),
    (4, 128): Schedule(32, 4, 1),
    (4, 256): Schedule(16, 8, 1),
}

PROGRAMS = 264  # fewer programs than this leave the device idle: split the keys
SCRATCH = 64 << 20  # bytes that a split may take


def key(size: int, head: int) -> tuple[int, int]:
    """The key of the tables for elements of `size` bytes and a padded head size."""
    head = max(head, 64)
    return (size, head) if (size, head) in TABLE else (size, 256)


def schedules(size: int, head: int) -> tuple[Schedule, ...]:
    """Every schedule for elements of `size` bytes and a padded head size (one bit class)."""
    return TABLE[key(size, head)]


def schedule(size: int, head: int, rows: int) -> Schedule:
    """The smallest tile that holds a group of `rows` rows, else the largest tile."""
    at = key(size, head)
    return choose("attention", bit_class(*at), wanted(at, rows), SINGLE[at], lambda: TABLE[at])


def wanted(at: tuple[int, int], rows: int) -> Schedule:
    """What the table says for a number of rows, certified or not."""
    return next((s for s in TABLE[at] if rows <= s.rows), TABLE[at][-1])


def bit_class(size: int, head: int) -> str:
    """Name of the bit class of a key."""
    return f"{size} bytes, head {head}"


def splits(tiles: int, chunks: int, scratch: int) -> bool:
    """Whether each chunk of keys gets a program of its own (a bit class by itself)."""
    wanted = chunks > 1 and tiles < PROGRAMS and scratch <= SCRATCH
    return choose(
        "attention", "split", wanted, False, lambda: (chunks > 1 and scratch <= SCRATCH, False)
    )
