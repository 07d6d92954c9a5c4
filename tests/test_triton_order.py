"""The order of a sum in the Triton kernels, term by term, as kernels/common/trees.py states it.

Sums in double hide their order from ordinary numbers, so the terms are large ones that cancel.
"""

import math

import pytest
import torch
from triton_set_up import DEVICE, FULL, law, same

from bicompile.kernels.common.trees import row_shape
from bicompile.kernels.norm import gpu as norm
from bicompile.kernels.reduce import gpu as reduce
from bicompile.kernels.softmax import gpu as softmax
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
    return acc[0]


@law
@pytest.mark.parametrize("k", [7, 300, 1000, 5000])
def test_sums_are_in_the_stated_order(k):
    generator = torch.Generator().manual_seed(k)
    x = CONTENTS["cancelling"]([5, k], 1, generator)
    wanted = torch.stack([in_order(row) for row in x]).float()
    assert (wanted != x.double().flip(1).cumsum(1)[:, -1].float()).any(), "the order is hidden"
    same(reduce.sum(x.to(DEVICE), [1], False, FULL).cpu(), wanted)


@law
@pytest.mark.parametrize("k", [7, 1000, 4096])
def test_means_of_norms_are_in_the_stated_order(k):
    """The mean of a block in registers; that of a gradient, of rows that are 0."""
    x = CONTENTS["cancelling"]([3, k], 1, torch.Generator().manual_seed(k))
    mean = torch.stack([in_order(row) for row in x])[:, None] / k
    there = x.to(DEVICE)
    same(norm.layer_norm(there, 1, None, None, 1e-5)[1].cpu(), mean.float())
    zero, one = torch.zeros(3, 1, device=DEVICE), torch.ones(3, 1, device=DEVICE)
    gradient = norm.layer_norm_backward(there, torch.zeros_like(there), 1, zero, one, None)
    same(gradient.cpu(), (x - mean).float())


@law
def test_the_sum_of_a_softmax_is_in_double():
    """In float32, none of the other terms would change the first."""
    x = torch.full((2, 1000), math.log(2.0**-25))
    x[:, 0] = 0.0
    total = torch.tensor(1.0 + 999 * 2.0**-25)
    same(softmax.softmax(x.to(DEVICE), 1, FULL)[:, 0].cpu(), (1.0 / total).expand(2))
