"""Schedules of the Triton attention: tiles, warps and stages. Free: they change no bit."""

from dataclasses import dataclass

from bicompile.certificate import choose


@dataclass(frozen=True)
class Schedule:
    """Rows of a tile, warps, pipeline stages, a limit on registers (0: none).

    `tma`: tiles of K and V come through the tensor memory accelerator (sm_90 and later) where their
    strides allow it, else through pointers.
    """

    rows: int
    warps: int
    stages: int
    registers: int = 0
    tma: bool = False


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

#: The same keys as `TABLE` -> the schedule that serves any number of rows on any device: used where
#: the others are not certified.
SINGLE = {
    (2, 64): Schedule(64, 4, 3),
    (2, 128): Schedule(64, 4, 2),
    (2, 256): Schedule(32, 4, 2),
    (4, 64): Schedule(32, 4, 2),
    (4, 128): Schedule(32, 4, 1),
    (4, 256): Schedule(16, 8, 1),
}

PROGRAMS = 132  # fewer programs than this leave the device idle: split the keys
SCRATCH = 64 << 20  # bytes that a split may take


def key(size: int, head: int) -> tuple[int, int]:
    """The key of the tables for elements of `size` bytes and a padded head size."""
    return size, min(max(head, 64), 256)


def table(at: tuple[int, int], capability: str) -> tuple[Schedule, ...]:
    """The entries of a key on a device."""
    return HOPPER[at] if capability == "9.0" and at in HOPPER else TABLE[at]


def schedules(at: tuple[int, int], capability: str) -> tuple[Schedule, ...]:
    """Every schedule of a key that runs on a device (one bit class), the single one first."""
    return tuple(dict.fromkeys((SINGLE[at], *table(at, capability), *TABLE[at])))


def schedule(size: int, head: int, rows: int, capability: str) -> Schedule:
    """The smallest tile that holds a group of `rows` rows, else the largest tile."""
    at = key(size, head)
    single = SINGLE[at]
    return choose(
        "attention", bit_class(*at), wanted(at, rows, capability), single,
        lambda: schedules(at, capability),
    )  # fmt: skip


def wanted(at: tuple[int, int], rows: int, capability: str) -> Schedule:
    """What the table says for a number of rows, certified or not."""
    entries = table(at, capability)
    return next((s for s in entries if rows <= s.rows), entries[-1])


def bit_class(size: int, head: int) -> str:
    """Name of the bit class of a key."""
    return f"{size} bytes, head {head}"


def splits(tiles: int, chunks: int, scratch: int) -> bool:
    """Whether each chunk of keys gets a program of its own (a bit class by itself)."""
    wanted = chunks > 1 and tiles < PROGRAMS and scratch <= SCRATCH
    return choose(
        "attention", "split", wanted, False, lambda: (chunks > 1 and scratch <= SCRATCH, False)
    )
