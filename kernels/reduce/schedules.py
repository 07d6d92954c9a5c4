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
    """One bit class: a schedule that serves any rows, and one that some run on (see `wanted`)."""

    name: str
    block: int
    single: Schedule
    many: Schedule


FEW = 256  # rows that run on the single schedule in any case

#: By terms of a block. Each warp has a row for itself where that fits: LANES terms of two bytes are
#: what a warp loads at once, and two warps would fold their parts through shared memory.
TABLE = (
    Entry("block 16", 16, Schedule(16, 1), Schedule(128, 4)),
    Entry("block 64", 64, Schedule(4, 1), Schedule(32, 4)),
    Entry("block 256", 256, Schedule(1, 1), Schedule(16, 4)),
    Entry("block 1024", 1024, Schedule(1, 1), Schedule(2, 2)),
    Entry("block 2048", 2048, Schedule(1, 1), Schedule(2, 2)),
    Entry("block 4096", 4096, Schedule(1, 1), Schedule(1, 2)),
)

#: Rows of more than one block: few of them leave room for a second warp, which hides latency.
LONG = Entry("blocks", 0, Schedule(1, 2), Schedule(1, 1))


def entry(k: int, block: int) -> Entry:
    """The bit class of rows of k terms in blocks of `block`."""
    return LONG if k > block else next(e for e in TABLE if block <= e.block)


def schedule(family: str, rows: int, k: int, block: int, crowded: bool) -> Schedule:
    """The schedule for `rows` rows of k terms in blocks of `block` (see `wanted`)."""
    e = entry(k, block)
    return choose(family, e.name, wanted(rows, e, crowded), e.single, lambda: (e.single, e.many))


def wanted(rows: int, e: Entry, crowded: bool) -> Schedule:
    """What the table says, certified or not.

    Args:
        rows: how many rows there are.
        e: their bit class.
        crowded: the kernel holds so much of each term that 4096 are too many for one warp.
    """
    apart = crowded if e.block == 4096 else rows > FEW
    return e.many if apart else e.single


def schedules(k: int, block: int) -> tuple[Schedule, ...]:
    """Every schedule that may serve rows of k terms (one bit class)."""
    e = entry(k, block)
    return e.single, e.many
