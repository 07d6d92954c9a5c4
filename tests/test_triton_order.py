"""The order of a sum in the Triton kernels, term by term, as kernels/common/trees.py states it.

Sums in double hide their order from ordinary numbers, so the terms are large ones that cancel.
"""

import pytest
import torch
from triton_set_up import DEVICE, FULL, law, same

from bicompile.kernels.common.trees import row_shape
from bicompile.kernels.reduce import gpu as reduce
from bicompile.testing.contents import CONTENTS


def in_order(row):
    """Blocks in rising order; a block folded by halves to lanes; a tree of neighbours."""
    j, lanes = row_shape(len(row))
    size = j * lanes
    padded = torch.zeros(-(-len(row) // size) * size, dtype=torch.float64)
    padded[: len(row)] = row.double()
    acc = torch.zeros(lanes, dtype=torch.float64)
    for block in padded.view(-1, j, lanes):
        while len(block) > 1:
            block = block[: len(block) // 2] + block[len(block) // 2 :]
        acc = acc + block[0]
    while len(acc) > 1:
        acc = acc[::2] + acc[1::2]
    return acc[0].float()


@law
@pytest.mark.parametrize("k", [7, 300, 1000, 5000])
def test_sums_are_in_the_stated_order(k):
    generator = torch.Generator().manual_seed(k)
    x = CONTENTS["cancelling"]([5, k], 1, generator)
    wanted = torch.stack([in_order(row) for row in x])
    assert (wanted != x.double().flip(1).cumsum(1)[:, -1].float()).any(), "the order is hidden"
    same(reduce.sum(x.to(DEVICE), [1], False, FULL).cpu(), wanted)
