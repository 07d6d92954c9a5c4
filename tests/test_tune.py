"""The race of matmul schedules: what takes part."""

from __future__ import annotations

import pytest
import torch

from bicompile import errors, tune

pytest.importorskip("triton")
from bicompile.kernels.matmul.schedules import Schedule


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("rows", tune.ROWS)
def test_candidates_fit_the_device(rows, two):
    found = list(tune.candidates(Schedule, rows, two, pointers=False))
    assert len(set(found)) == len(found) > 20
    for s in found:
        assert (s.bm + s.bn * (2 if two else 1)) * s.bk * 2 * s.stages <= tune.SHARED
        assert s.bm * s.bn * (2 if two else 1) <= 128 * 256
        assert s.tma or not s.persistent
    assert {s.tma for s in found} == {False, True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_needs_a_gpu():
    with pytest.raises(errors.BicompileError, match="PyTorch sees no GPU"):
        tune.main([])


@pytest.mark.gpu
def test_race_of_a_small_layer():
    found = tune.race("mm_add", 256, 128, 8)
    assert found.other_bits == []
    assert found.best[0][1] <= found.table
    assert found.library > 0
