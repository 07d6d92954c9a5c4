"""Memory behind the few rows of a result.

The product that reads them does so in whole tiles: a tensor descriptor is slow at rows beyond its
matrix. What stands in the others nobody asks, for a row of a product depends on no other.
"""

import torch

TILES = 16, 64  # rows of tiles that few rows fill in part


def rows_with_room(m: int) -> int:
    """Rows of a whole tile where m rows are a part of one; else m."""
    return next((rows for rows in TILES if m <= rows), m)


def empty_with_room(m: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[m, *shape], contiguous, not initialised; with memory for whole tiles of rows."""
    return torch.empty((rows_with_room(m), *shape), dtype=dtype, device=device)[:m]


def rows_that_fit(x: torch.Tensor) -> int:
    """`rows_with_room` of x [M, K] if its memory goes on for so many rows; else M."""
    (m, k), (row, column) = x.shape, x.stride()
    wanted = rows_with_room(m)
    last = x.storage_offset() + (wanted - 1) * row + k
    has = column == 1 and last * x.element_size() <= x.untyped_storage().nbytes()
    return wanted if has else m
