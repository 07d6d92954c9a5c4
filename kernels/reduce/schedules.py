"""Schedules of the row kernels (reduce, softmax, norm): rows per program, warps. Free: no bits."""

from dataclasses import dataclass

from bicompile.certificate import choose


@dataclass(frozen=True)
class Schedule:
    """Rows per program, and its warps."""

    rows: int
    warps: int


@dataclass(frozen=True)
class Entry:
    """One bit class: a schedule that serves any number of rows, and one that many rows run on."""

    name: str
    block: int
    single: Schedule
    many: Schedule


FEW = 256  # rows that run on the single schedule in any case

#: By terms of a block.
TABLE = (
    Entry("block 16", 16, Schedule(16, 1), Schedule(128, 4)),
    Entry("block 64", 64, Schedule(4, 1), Schedule(32, 4)),
    Entry("block 256", 256, Schedule(1, 1), Schedule(8, 4)),
    Entry("block 1024", 1024, Schedule(1, 2), Schedule(2, 2)),
    Entry("block 2048", 2048, Schedule(1, 4), Schedule(1, 2)),
    Entry("block 4096", 4096, Schedule(1, 4), Schedule(1, 2)),
)

#: Rows of more than one block: the warps hide the latency of the loop.
LONG = Entry("blocks", 0, Schedule(1, 8), Schedule(1, 4))


def entry(k: int, block: int) -> Entry:
    """The bit class of rows of k terms in blocks of `block`."""
    return LONG if k > block else next(e for e in TABLE if block <= e.block)


def schedule(family: str, rows: int, k: int, block: int) -> Schedule:
    """The schedule for `rows` rows of k terms in blocks of `block`."""
    e = entry(k, block)
    return choose(family, e.name, wanted(rows, e), e.single, lambda: (e.single, e.many))


def wanted(rows: int, e: Entry) -> Schedule:
    """What the table says for a number of rows, certified or not."""
    return e.single if rows <= FEW else e.many


def schedules(k: int, block: int) -> tuple[Schedule, ...]:
    """Every schedule that may serve rows of k terms (one bit class)."""
    e = entry(k, block)
    return e.single, e.many
