"""Sizes of axes that cross the bounds of vectors, tiles, blocks and choices by size."""

from __future__ import annotations

BOUNDARIES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
WIDE = (*BOUNDARIES, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 2049)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 25, 31, 33, 65)
SMALL = (1, 2, 3, 4)


def axis_sizes(axis: str, crowded: bool, windows: int) -> tuple[int, ...]:
    """Sizes of an axis; `crowded` keeps calls with many axes small, and so do several windows."""
    if axis[0] == "I":
        return (1, 2, 7, 16, 33, 130) if windows == 1 else (1, 2, 5, 9, 17)
    if axis[0] == "W":
        return (1, 2, 3, 7)
    if windows and axis[0] == "N":
        return (*SMALL, 5, 17)
    if axis[0] in "BHC":
        return SMALL
    if axis[0] in "KS":
        return BOUNDARIES if crowded else WIDE
    if axis[0] == "D":
        return (1, 3, 8, 16, 33, 64, 80)
    return SMALL if crowded else ROWS
