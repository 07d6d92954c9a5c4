"""The race of matmul schedules: what takes part, and what is kept."""

from __future__ import annotations

import pytest
import torch

from bicompile import errors, tune

pytest.importorskip("triton")
from bicompile.kernels.matmul import candidates, table
from bicompile.kernels.matmul.schedules import Schedule
from bicompile.kernels.matmul.table import Entry, by_time


@pytest.mark.parametrize("kind", tune.LAYERS)
@pytest.mark.parametrize("rows", tune.ROWS)
def test_candidates_fit_the_device(rows, kind):
    factors = 2 if kind == "half pair" else 1
    found = list(candidates.candidates(kind, rows))
    assert len(set(found)) == len(found) > 15
    for s in found:
        assert (s.bm + s.bn * factors) * s.bk * 2 * s.stages <= candidates.SHARED
        assert s.bm * s.bn * factors <= 128 * 256
        assert s.tma or not (s.persistent or s.columns[1])
        assert not s.tma or s.masked or s.bm <= max(rows, 16)
        assert s.tma or not s.masked
    assert {s.tma for s in found} == {False, True}


def test_what_is_kept_has_the_best_times():
    def entry(rows, bn, *waves, tma=True):
        return Entry(rows, Schedule(16, bn, 128, 4, 4, tma), waves)

    found = []
    for rows in tune.ROWS:
        few, many = entry(rows, 32, 10.0, 20.0), entry(rows, 128, 30.0, 60.0)
        slow, near = entry(rows, 64, 25.0, 50.0), entry(rows, 32, 10.1, 20.2, tma=False)
        pointers = entry(rows, 128, 33.0, 66.0, tma=False)
        found += [few, slow, many, pointers, near]
    best = {(32, True), (128, True), (32, False), (128, False)}
    for tolerance, expected in ((0.0, best), (0.4, best - {(128, False)})):
        kept = tune.needed(found, tolerance, 132)
        assert {(e.schedule.bn, e.schedule.tma) for e in kept} == expected


def test_other_rows_keep_their_entries():
    def entry(rows, bk, time):
        return Entry(rows, Schedule(16, 32, bk, 4, 4, True), (time,) * tune.QUARTERS)

    before = entry(16, 128, 7.0), entry(16, 256, 9.0), entry(31, 128, 5.0)
    timed = [entry(16, 128, 9.0), entry(16, 256, 8.0)]
    assert tune.joined(timed, before, False, 0.0, 132) == (timed[1], before[2])
    assert tune.joined(timed, before, True, 0.0, 132) == (before[0], before[2])


def test_times_are_refined():
    def entry(rows, bn, *waves):
        waves += (9.0,) * (tune.QUARTERS - len(waves))
        return Entry(rows, Schedule(16, bn, 128, 4, 4), waves)

    before = [entry(16, 32, 3.0, 5.0), entry(16, 64, 2.0), Entry(31, Schedule(64, 64, 128, 4, 3))]
    after = [entry(31, 32, 4.0), entry(16, 32, 4.0, 4.0)]
    assert tune.refined(after, before) == [entry(16, 32, 3.0, 4.0), entry(16, 64, 2.0), after[0]]


def test_times_are_read_as_they_are_written(tmp_path, monkeypatch):
    found = {kind: table.table(kind, "9.0") for kind in tune.LAYERS}
    assert all(found[kind] != table.TABLE[kind] for kind in found)
    tune.write(tmp_path / "times-sm9.9.json", {"gpu": "one"}, found)
    monkeypatch.setattr(table, "__file__", str(tmp_path / "table.py"))
    assert {kind: table.table(kind, "9.9") for kind in found} == found


@pytest.mark.parametrize(("room", "rows"), [(1, 1), (16, 16), (64, 16)])
def test_a_row_is_read_as_the_tile_that_takes_least_where_there_is_room(room, rows):
    def entry(rows, time, **how):
        return Entry(rows, Schedule(max(rows, 16), 32, 128, 4, 4, **how), (time,))

    masked = entry(16, 1.0, tma=True, masked=True)  # takes no more where a tile is not full
    of_tiles = entry(16, 2.0, tma=True), entry(64, 2.5, tma=True)
    found = by_time([entry(1, 3.0), masked, *of_tiles], 132, 1, 32, 4096, room)
    assert found[-1].rows == rows and masked not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_needs_a_gpu():
    with pytest.raises(errors.BicompileError, match="PyTorch sees no GPU"):
        tune.main([])


@pytest.mark.gpu
def test_race_of_a_small_layer():
    weights = tune.Weights("half")
    entries = table.table("half", "9.0")
    found = tune.race("half", entries, 8, 256, 128, weights)
    assert found.best <= found.table
    assert found.library > 0
