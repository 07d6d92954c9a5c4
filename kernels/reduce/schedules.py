"""What a schedule of the row kernels (reduce, softmax, norm) is. Free: no bits.

`table.py` says which one serves which rows.
"""

from dataclasses import dataclass

from bicompile.kernels.common.trees import BLOCK


@dataclass(frozen=True)
class Schedule:
    """Rows per program, and its warps; or the blocks of a row per program: 0 stands for all."""

    rows: int
    warps: int
    blocks: int = 0

    def parts(self, k: int) -> int:
        """Into how many parts a row of k terms is cut, each for a program of its own."""
        return -(-k // (self.blocks * BLOCK)) if self.blocks else 0


#: bit class (by terms of a block; "blocks": rows of several) -> the schedule that serves any rows:
#: used where the others are not certified.
SINGLE = {
    "block 16": Schedule(16, 1),
    "block 64": Schedule(4, 1),
    "block 256": Schedule(1, 1),
    "block 1024": Schedule(1, 1),
    "block 2048": Schedule(1, 1),
    "block 4096": Schedule(1, 1),
    "blocks": Schedule(1, 4),
}
