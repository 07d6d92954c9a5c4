"""What a schedule of the Triton attention is: tiles, warps and stages. Free: they change no bit.

`table.py` says which one serves how many rows.
"""

from dataclasses import dataclass


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


#: (bytes per element, largest padded head size) -> the schedule that serves any number of rows on
#: any device: used where the others are not certified.
SINGLE = {
    (2, 64): Schedule(64, 4, 3),
    (2, 128): Schedule(64, 4, 2),
    (2, 256): Schedule(32, 4, 2),
    (4, 64): Schedule(32, 4, 2),
    (4, 128): Schedule(32, 4, 1),
    (4, 256): Schedule(16, 8, 1),
}


def key(size: int, head: int) -> tuple[int, int]:
    """The key of the tables for elements of `size` bytes and a padded head size."""
    return size, min(max(head, 64), 256)


def bit_class(size: int, head: int) -> str:
    """Name of the bit class of a key."""
    return f"{size} bytes, head {head}"
