"""Which schedule of the row kernels serves which rows.

Certificates do not cover this file: it chooses among the schedules that they list.
"""

from dataclasses import dataclass

from bicompile.kernels.common.trees import BLOCK
from bicompile.kernels.reduce.schedules import SINGLE, Schedule


@dataclass(frozen=True)
class Entry:
    """One bit class: its single schedule, and some that others run on (see `wanted`).

    Args:
        name: of the class.
        block: terms of a block; 0: of rows of several blocks.
        many: serves many rows.
        held: bounds of rows, rising, and what serves a kernel that holds its block in registers.
        parts: serve long rows, in parts.
    """

    name: str
    block: int
    many: Schedule
    held: tuple[tuple[int, Schedule], ...] = ()
    parts: tuple[Schedule, ...] = ()

    @property
    def single(self) -> Schedule:
        """Serves any rows."""
        return SINGLE[self.name]

    def schedules(self, cut: bool = True) -> tuple[Schedule, ...]:
        """All of them; without `cut` those of kernels that have whole rows only."""
        found = self.single, self.many, *(s for _, s in self.held), *(self.parts if cut else ())
        return tuple(dict.fromkeys(found))


FEW = 256  # rows that leave processors idle
ANY = 1 << 62  # rows

#: By terms of a block. Each warp has a row for itself where that fits: LANES terms of two bytes are
#: what a warp loads at once, and nothing goes through shared memory. What is held in registers is
#: shared by warps, if rows are few or a warp would hold too much.
TABLE = (
    Entry("block 16", 16, Schedule(128, 4)),
    Entry("block 64", 64, Schedule(32, 4)),
    Entry("block 256", 256, Schedule(16, 4)),
    Entry(
        "block 1024", 1024, Schedule(2, 2), held=((FEW, Schedule(1, 4)), (ANY, Schedule(2, 2)))
    ),
    Entry(
        "block 2048", 2048, Schedule(2, 2), held=((1024, Schedule(1, 4)), (ANY, Schedule(1, 2)))
    ),
    Entry(
        "block 4096", 4096, Schedule(1, 2), held=((128, Schedule(1, 8)), (ANY, Schedule(1, 4)))
    ),
)  # fmt: skip

PARTS = Schedule(1, 2, blocks=1), Schedule(1, 4, blocks=4)

#: Rows of more than one block: few of them leave processors idle, so that their blocks are given to
#: several programs.
LONG = Entry("blocks", 0, Schedule(1, 2), parts=PARTS)
CUT = 128  # rows that are cut into parts, if there are no more than 4 for each of their blocks
BLOCKS = 2048  # so many blocks are a program each, in several rows
SOME = 128  # rows of one block whose exponentials keep a warp busy for longer than a second costs


def entry(k: int, block: int) -> Entry:
    """The bit class of rows of k terms in blocks of `block`."""
    return LONG if k > block else next(e for e in TABLE if block <= e.block)


def wanted(
    family: str, rows: int, k: int, e: Entry, crowded: bool, held: bool, cut: bool
) -> Schedule:
    """What the table says, certified or not.

    Args:
        family: of the kernel.
        rows: how many rows there are.
        k: of how many terms.
        e: their bit class.
        crowded: the kernel holds so much of each term that 4096 are too many for one warp.
        held: the kernel has rows of one block in registers.
        cut: the kernel can have rows in parts.
    """
    blocks = -(-k // BLOCK)
    if cut and blocks > 2 and rows <= min(CUT, 4 * blocks):
        return e.parts[rows > 1 and rows * blocks >= BLOCKS]
    if held and e.held:
        return next(s for bound, s in e.held if rows <= bound)
    if e.block == 4096:
        apart = crowded or (family == "softmax" and rows <= SOME)
    else:
        apart = rows > FEW and blocks <= 2
    return e.many if apart else e.single


def schedules(k: int, block: int, cut: bool = True) -> tuple[Schedule, ...]:
    """Every schedule that may serve rows of k terms (one bit class)."""
    return entry(k, block).schedules(cut)
