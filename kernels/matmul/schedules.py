"""What a schedule of the Triton matmul is: tiles, warps and stages. Free: no bits.

`table.py` says which one serves which size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Tile of the output, step in K, warps and pipeline stages.

    With `tma` the operands are read as blocks of tensor descriptors, which needs rows that start at
    multiples of 16 bytes. `persistent`: as many programs as multiprocessors, each with many tiles.
    `parts`: column parts in which a tile is stored. `masked` (with `tma`): the left operand is read
    and the result is stored by pointers, so that rows of a tile beyond the matrix move no bytes.

    Triton's blocks are powers of two. Tiles of three times a power of two columns (tma alone) are
    two products, of two thirds and of one third of the columns.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False
    parts: int = 1
    masked: bool = False

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of the tile's first product and of its second; 0 if it is one product."""
        return (self.bn // 3 * 2, self.bn // 3) if self.bn % 3 == 0 else (self.bn, 0)

    def serves_several(self, columns: int) -> bool:
        """Whether one launch can be of several products, none of which has fewer columns."""
        return not self.tma or not (self.persistent or self.columns[1] or self.bn > columns)


PART = 32  # pinned: terms of one chain of an "ieee" product, so its bk
FAST_DOUBLE = ("8.0", "9.0")  # pinned: devices half as fast in float64 as in float32

#: kind -> the schedule that serves any size: used where the others are not certified. "pair": two
#: products that share their left side, a tile of each.
SINGLE = {
    "half": Schedule(64, 64, 128, 4, 3),
    "half pair": Schedule(64, 64, 64, 4, 3),
    "tf32": Schedule(64, 64, 32, 4, 4),
    "tf32 pair": Schedule(64, 64, 32, 4, 3),
    "double": Schedule(64, 64, 64, 8, 3),
    "double pair": Schedule(64, 32, 32, 4, 4),
    "ieee": Schedule(16, 32, 32, 2, 5),
    "ieee pair": Schedule(32, 32, 32, 4, 3),
}


def kind_of(dtype: torch.dtype, tf32: bool, capability: str) -> str:
    """How products are summed: "half", "tf32", and in full precision "double" or "ieee".

    Triton 3.6 cannot compile products in float64 for compute capability 10.0.
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "double" if capability in FAST_DOUBLE else "ieee"


def kinds(capability: str) -> tuple[str, ...]:
    """The kinds of a device, with those of two products that share their left side."""
    other = kind_of(torch.float32, False, "" if capability in FAST_DOUBLE else FAST_DOUBLE[0])
    return tuple(k for k in SINGLE if k.split()[0] != other)
