"""Schedules that are chosen in whole steps: the search, the file, and what the launch takes."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from bicompile import certificate, errors

pytest.importorskip("triton")
from bicompile import tune_steps
from bicompile.bench.cases import Shapes
from bicompile.kernels.matmul import candidates, gpu, table
from bicompile.kernels.matmul.schedules import Schedule

A, B, C, D = (Schedule(16, 32, 128, 4, stages, True) for stages in (3, 4, 5, 6))
FIRST, SECOND = ("half pair", 1, 96, 64), ("half", 1, 64, 64)


@pytest.mark.parametrize("kind", ["half", "half pair"])
@pytest.mark.parametrize("rows", [16, 64])
def test_candidates_fit_the_device(kind, rows):
    found = list(candidates.candidates_in_steps(kind, rows))
    assert len(set(found)) == len(found) > 40
    factors = candidates.factors_of(kind)
    for s in found:
        assert s.bm == rows and s.tma and not s.masked
        assert (s.bm + s.bn * factors) * s.bk * 2 * s.stages < candidates.SHARED
    assert len({(s.bn, s.bk, s.warps) for s in found}) < len(found)  # several stages of each


def searched(cost):
    """What a search finds where a step takes `cost` of what is chosen, and what it asked for."""
    asked = []

    def ratio(chosen, size, schedule, rounds):
        asked.append((size, schedule))
        return cost({**chosen, size: schedule}) / cost(chosen)

    return tune_steps.better({FIRST: [A, B, C], SECOND: [A, B, D]}, ratio), asked


def test_what_makes_a_step_faster_is_kept():
    saved = {(FIRST, B): 0.02, (FIRST, C): 0.01, (SECOND, A): 0.001}
    found, _ = searched(lambda chosen: 1 - sum(saved.get(c, 0.0) for c in chosen.items()))
    assert found == {FIRST: B}  # a thousandth is noise


def test_what_was_chosen_is_tried_beside_what_is_chosen_after_it():
    def cost(chosen):
        first, second = chosen.get(FIRST), chosen.get(SECOND)
        alone = {A: 0.97, B: 0.98}.get(first, 1.0) * {D: 0.98}.get(second, 1.0)
        return 0.9 if (first, second) == (B, D) else alone

    found, _ = searched(cost)
    assert found == {FIRST: B, SECOND: D}


def test_what_cannot_run_is_not_asked_for_again():
    found, asked = searched(lambda chosen: math.inf if B in chosen.values() else 1.0)
    assert found == {}
    assert asked.count((FIRST, B)) == 1 < asked.count((FIRST, A))


@pytest.fixture
def recorded(monkeypatch):
    """Steps of a model that is not there: what they return and take follows what is chosen."""

    def logits(self, chosen, seen=None):
        if D in chosen.values():
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([1.0, 2.0 if C in chosen.values() else 3.0])

    steps = object.__new__(tune_steps.Steps)
    monkeypatch.setattr(tune_steps.Steps, "logits", logits)
    monkeypatch.setattr(tune_steps.Steps, "record", lambda self, chosen: dict(chosen))
    monkeypatch.setattr(
        tune_steps.Steps, "seconds", lambda self, graph: 0.5 ** len({*graph.values()} & {A, B})
    )
    steps.expected, steps.other, steps.least = steps.logits({}), [], {}
    steps.recorded = {}, steps.record({})
    return steps


def test_a_schedule_is_timed_beside_what_was_chosen(recorded):
    assert recorded.ratio({}, {}, FIRST, A, 3) == 0.5
    assert recorded.ratio({}, {FIRST: A}, SECOND, B, 3) == 0.5
    assert recorded.ratio({FIRST: A}, {SECOND: B}, SECOND, B, 3) == 1.0
    assert recorded.recorded[0] == {FIRST: A, SECOND: B}
    assert recorded.other == []


def test_other_bits_are_left_out_and_named(recorded):
    assert recorded.ratio({}, {}, FIRST, C, 3) == math.inf
    assert recorded.other == [f"{FIRST} {C}"]


def test_what_cannot_run_is_said(recorded, capsys):
    assert recorded.ratio({}, {}, FIRST, D, 3) == math.inf
    assert recorded.other == []
    assert "out of resource" in capsys.readouterr().err


def test_launches_take_what_is_tried_and_sizes_are_counted(recorded):
    def asked(blocks=True):
        with certificate.one_schedule():  # needs no device
            return gpu.schedule("half", "9.0", 132, 1, 64, 64, blocks, 16, 32)

    seen, before = Counter(), asked()
    with recorded.using({SECOND: A}, seen):
        assert asked() == A != before
        assert asked(blocks=False) != A  # A is of descriptors
    assert asked() == before
    assert seen == {SECOND: 2} and recorded.least == {SECOND: 32}


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """What the table has for a device 9.9, from a file that the fixture writes."""
    for cached in (table.table, table.steps, table.ranked):
        cached.cache_clear()
        monkeypatch.setattr(table, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(table, "__file__", str(tmp_path / "table.py"))

    def write(found, timed=()):
        tune_steps.write(tmp_path / "steps-sm9.9.json", {"gpu": "one"}, found, timed)
        return json.loads((tmp_path / "steps-sm9.9.json").read_text())

    return write


def test_sizes_are_read_as_they_are_written(steps):
    steps({FIRST: A, SECOND: B}, [{"model": "m", "batch": 1, "before": 2.0, "after": 1.0}])
    again = {"model": "n", "batch": 1, "before": 3.0, "after": 2.0}
    content = steps({SECOND: C}, [again])
    assert table.steps("9.9") == {FIRST: A, SECOND: C}  # others stay
    assert content["machine"] == {"gpu": "one"}
    assert [s["model"] for s in content["steps"]] == ["m", "n"]
    assert steps({}, [again | {"after": 1.5}])["steps"][1]["after"] == 1.5
    assert table.steps("9.8") == {}


def chosen(m=1, n=64, k=64, blocks=True, room=16, least=0, kind="half"):
    return table.ranked(kind, "9.9", 132, m, n, k, blocks, room, least)[-1]


def test_sizes_that_were_timed_take_what_was_fastest(steps):
    others = chosen(), chosen(m=2), chosen(kind="half pair")
    steps({SECOND: A})
    assert chosen() == A != others[0]
    assert chosen(m=16, room=0) != A  # another number of rows
    assert (chosen(m=2), chosen(kind="half pair")) == others[1:]
    assert chosen(n=128) != A != chosen(k=128)
    found = table.ranked("half", "9.9", 132, 1, 64, 64, True, 16)
    assert sorted(found, key=str) == sorted(table.schedules("half", "9.9"), key=str)


def test_rows_count_as_they_were_timed(steps):
    steps({("half", 16, 64, 64): A})
    assert {chosen(m=m) for m in (2, 5, 15, 16)} == {A}
    assert A not in {chosen(m=1), chosen(m=17, room=64)}


def test_a_tile_that_reads_beyond_the_memory_of_its_rows_is_not_taken(steps):
    steps({SECOND: A})
    assert chosen(room=0) != A != chosen(room=1)
    masked = Schedule(16, 32, 128, 4, 3, True, masked=True)
    steps({SECOND: masked})
    assert chosen(room=0) == masked
    assert chosen(blocks=False) != masked


def test_a_schedule_of_one_product_does_not_serve_three(steps):
    steps({SECOND: Schedule(16, 48, 128, 4, 3, True)})
    assert chosen().bn == 48 != chosen(least=16).bn


def test_sizes_in_use_are_in_the_tables():
    """Each once, with a schedule that could be built for it."""
    for (kind, rows, columns, terms), s in table.steps("9.0").items():
        assert rows in table.ROWS and s in table.schedules(kind, "9.0")
        found = table.ranked(kind, "9.0", 132, rows, columns, terms, True, max(rows, s.bm))
        assert found[-1] == s and len(set(found)) == len(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_needs_a_gpu(tmp_path):
    with pytest.raises(errors.BicompileError, match="PyTorch sees no GPU"):
        tune_steps.main(["--json", str(tmp_path / "steps.json")])


def test_batches_of_more_rows_than_a_tile_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune_steps.main(["--batch", "65", "--json", str(tmp_path / "steps.json")])
    assert "1 to 64" in capsys.readouterr().err


@pytest.mark.gpu
def test_steps_of_a_small_model(tmp_path, monkeypatch):
    small = Shapes(2, hidden=256, intermediate=512, heads=4, kv_heads=2, head_size=64)
    monkeypatch.setattr(tune_steps, "MODELS", {"small": small})
    few = candidates.candidates_in_steps
    monkeypatch.setattr(tune_steps, "candidates_in_steps", lambda *a: list(few(*a))[:2])
    monkeypatch.setattr(tune_steps, "CONTEXT", 64)
    file = tmp_path / "steps.json"
    assert tune_steps.main(["--model", "small", "--batch", "1", "3", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [s["batch"] for s in content["steps"]] == [1, 3]
    assert all(s["before"] > 0 and s["after"] > 0 for s in content["steps"])
