"""The laws of the Triton kernel of index_add."""

import pytest
import torch
from triton_set_up import DEVICE, DTYPES, INF, INTERPRET, NAN, law, randn, same, views

from bicompile.kernels.scatter import gpu as scatter
from bicompile.testing.contents import CONTENTS


@law
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", (1, 33) if INTERPRET else (1, 33, 700))
def test_each_row_sums_its_own_sources(dtype, m):
    start, sources = randn(5, m, dtype=dtype), randn(40, m, dtype=dtype, seed=1) * 100
    index = torch.tensor([2, 0, 2, 4, 2, 2, 1, 2] * 5, device=DEVICE)
    whole = scatter.index_add(start, index, sources, 1.0)
    wanted = start.double()
    for k, s in enumerate(index.tolist()):
        wanted[s] += sources[k].double()
    same(whole, wanted.float().to(dtype))
    own = index == 2
    same(scatter.index_add(start[2:3], index[own] * 0, sources[own], 1.0)[0], whole[2])
    same(scatter.index_add(start, index.int(), sources, 1.0), whole)
    for view in views(sources):
        same(scatter.index_add(start, index, view, 1.0), whole)
        same(scatter.index_add(start[:, :1], index, view[:, :1], 1.0), whole[:, :1])
    sources[1], sources[6] = NAN, INF
    spoiled = scatter.index_add(start, index, sources, 1.0)
    same(spoiled[2:], whole[2:])
    same(scatter.index_add(start, index[:0], sources[:0], 1.0), start)


@law
def test_sources_are_added_in_their_order():
    generator = torch.Generator().manual_seed(0)
    source = CONTENTS["cancelling"]([90, 21], 0, generator)
    factor = torch.tensor(0.3).double()
    wanted = torch.zeros(21, dtype=torch.float64)
    for row in source:
        wanted += row.double() * factor
    index, start = torch.zeros(90, dtype=torch.long), torch.zeros(1, 21)
    found = scatter.index_add(start.to(DEVICE), index.to(DEVICE), source.to(DEVICE), 0.3)
    same(found[0].cpu(), wanted.float())
