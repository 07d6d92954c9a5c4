"""Which schedule of the Triton attention serves how many rows, and when keys are split.

Certificates do not cover this file: it chooses among the schedules that they list.
"""

from bicompile.kernels.attention.schedules import SINGLE, Schedule

#: (bytes per element, largest padded head size) -> schedules in rising order of rows; all within
#: 99 KB of shared memory (sm_80 and later).
TABLE = {
    (2, 64): (Schedule(16, 4, 3), Schedule(64, 4, 3), Schedule(128, 8, 3)),
    (2, 128): (Schedule(16, 4, 3), Schedule(64, 4, 2), Schedule(128, 8, 2)),
    (2, 256): (Schedule(16, 4, 2), Schedule(32, 4, 2)),
    (4, 64): (Schedule(16, 4, 2), Schedule(32, 4, 2)),
    (4, 128): (Schedule(16, 4, 1), Schedule(32, 4, 1)),
    (4, 256): (Schedule(16, 8, 1),),
}

#: The same for compute capability 9.0: 227 KB; 64 rows leave room for two programs on a
#: multiprocessor, one of which multiplies while the other takes exponentials.
HOPPER = {
    (2, 64): (Schedule(16, 4, 3, tma=True), Schedule(64, 4, 3, tma=True)),
    (2, 128): (Schedule(16, 4, 3, tma=True), Schedule(64, 4, 3, tma=True)),
    (2, 256): (Schedule(16, 4, 2, tma=True), Schedule(64, 8, 2, tma=True)),
}

PROGRAMS = 132  # fewer programs than this leave the device idle: split the keys
SCRATCH = 64 << 20  # bytes that a split may take


def table(at: tuple[int, int], capability: str) -> tuple[Schedule, ...]:
    """The entries of a key on a device."""
    return HOPPER[at] if capability == "9.0" and at in HOPPER else TABLE[at]


def schedules(at: tuple[int, int], capability: str) -> tuple[Schedule, ...]:
    """Every schedule of a key that runs on a device (one bit class), the single one first."""
    return tuple(dict.fromkeys((SINGLE[at], *table(at, capability), *TABLE[at])))


def wanted(at: tuple[int, int], rows: int, capability: str) -> Schedule:
    """What the table says for a number of rows, certified or not."""
    entries = table(at, capability)
    return next((s for s in entries if rows <= s.rows), entries[-1])


def splits(tiles: int, chunks: int, scratch: int) -> bool:
    """Whether each chunk of keys is to have a program of its own."""
    return may_split(chunks, scratch) and tiles < PROGRAMS


def may_split(chunks: int, scratch: int) -> bool:
    """Whether there is something to split, and room for what the parts hand on."""
    return chunks > 1 and scratch <= SCRATCH
