"""Sweeps of plain functions: each way to leave a bit class is found, named and not certified."""

from __future__ import annotations

import argparse
import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
from rich.console import Console
from triton.runtime.errors import OutOfResources

from bicompile import certificate, cli, verify, verify_text
from bicompile.certificate import Certificate, Family, Machine
from bicompile.errors import SweepFailed
from bicompile.sweep import BitClass, Depth, Problem, check

HERE = Machine("a GPU", "9.0", "3.6.0", "2.11.0")


def honest(x):
    """Left to right, row by row."""
    total = torch.zeros(x.shape[0])
    for column in x.unbind(1):
        total = total + column
    return total


def splits_the_row(x):
    half = x.shape[1] // 2
    return honest(x[:, :half]) + honest(x[:, half:])


def misaligned_input_runs_another_body(x):
    return honest(x) if x.storage_offset() % 4 == 0 else splits_the_row(x)


def one_row_runs_another_body(x):
    return honest(x) if len(x) > 1 else splits_the_row(x)


def last_rows_run_another_body(x):
    rows = len(x) // 8 * 8
    return torch.cat([honest(x[:rows]), splits_the_row(x[rows:])])


def infinities_are_clamped(x):
    return honest(x.clamp(-3e38, 3e38))


def subnormal_terms_are_flushed(x):
    return honest(torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0.0, x))


def one_row_is_never_written(x):
    out = torch.empty(len(x))
    out[:-1] = honest(x)[:-1]
    return out


def needs_much_memory(x):
    raise OutOfResources(300_000, 232_448, "shared memory")


def crashes(x):
    raise RuntimeError("an illegal memory access was encountered")


FOUND = {
    splits_the_row: "random values, all rows",
    misaligned_input_runs_another_body: "misaligned",
    one_row_runs_another_body: "rows 5 to 5",
    last_rows_run_another_body: "random values, all rows",
    one_row_is_never_written: "random values, all rows",
    infinities_are_clamped: "special values",
    subnormal_terms_are_flushed: "subnormal values",
}
VALUES = "random", "special", "subnormal"


def honest_too(x):
    return honest(x.clone())


class Schedule:
    """A function that goes by its name."""

    def __init__(self, function):
        self.function = function

    def __repr__(self):
        return self.function.__name__


def make(*others, single=honest):
    problem = Problem(
        "sum 19x100", torch.float32, ((19, 100),), lambda x, s: s.function(x[0]),
        rows=((5, 6), (3, 11)), layouts=("misaligned", "reversed strides"), values=VALUES,
    )  # fmt: skip
    schedules = [Schedule(f) for f in (single, *others)]
    return BitClass("reduce", "sums", schedules[0], schedules, (problem,))


@pytest.fixture
def sweep_of(monkeypatch):
    """Sweep a class of plain functions, in this process, on the CPU."""
    monkeypatch.setattr(verify, "INTERPRETED", True)

    def run(bit_class):
        monkeypatch.setattr(verify, "_classes", lambda module, depth: [bit_class])
        (result,) = verify.sweep(["a module"], Depth.SMALL, 1)
        return result

    return run


@pytest.mark.parametrize("planted", FOUND, ids=lambda f: f.__name__)
def test_what_leaves_the_class_is_found(sweep_of, planted):
    result = sweep_of(make(planted))
    (difference,) = result.splits
    assert result.members == ("honest",)
    text = verify_text.describe(difference)
    assert f"reduce, sums: {planted.__name__} is not in its class\n  sum 19x100; " in text
    assert FOUND[planted] in difference.call
    assert "first at [" in text and " is not 0x" in text


def test_equal_bits_are_certified(sweep_of):
    result = sweep_of(make(honest_too))
    assert result.members == ("honest", "honest_too")
    calls = 1 + 2 + 2 * 2  # whole, in two layouts, two ranges of rows in two layouts
    assert result.outcome.cases == calls * len(VALUES)
    listing = verify.certify([result], HERE).families["reduce"].classes["sums"]
    assert listing.schedules == result.members
    assert listing.digest == sweep_of(make()).outcome.digest != sweep_of(other()).outcome.digest


def other():
    return make(single=splits_the_row)


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_a_problem_in_parts_is_the_same_problem(sweep_of, monkeypatch, at_once):
    """Parts of its calls, and some of the schedules at a time."""
    whole = make(one_row_runs_another_body, needs_much_memory, honest_too, splits_the_row)
    (problem,) = whole.problems
    expected = sweep_of(whole)
    monkeypatch.setattr(verify, "AT_ONCE", at_once)
    for parts in (1, 2, 3, 7):
        cut = dataclasses.replace(whole, problems=[dataclasses.replace(problem, parts=parts)])
        seen = sweep_of(cut)
        assert seen.outcome.cases == expected.outcome.cases
        assert seen.outcome.digest == expected.outcome.digest
        assert seen.members == expected.members == ("honest", "honest_too")
        assert {d.schedule for d in seen.splits} == {d.schedule for d in expected.splits}


def test_a_single_schedule_that_disagrees_with_itself_certifies_nothing(sweep_of):
    result = sweep_of(make(honest, single=one_row_runs_another_body))
    assert result.splits and result.members == ()
    assert verify.certify([result], HERE).families["reduce"].classes == {}


@pytest.mark.parametrize("single", [honest, needs_much_memory], ids=lambda f: f.__name__)
def test_what_does_not_fit_is_left_out(sweep_of, single):
    result = sweep_of(make(needs_much_memory, splits_the_row, single=single))
    fates = {d.schedule: d.runs for d in result.outcome.differences}
    if single is honest:
        assert fates == {"needs_much_memory": False, "splits_the_row": True}
        assert result.members == ("honest",)
    else:
        assert fates == {"needs_much_memory": False}
        assert result.members == ()
    text = verify_text.describe(result.outcome.differences[-1])
    assert "needs_much_memory does not run here" in text and "232448" in text


def test_a_crash_ends_the_sweep_of_its_class(sweep_of):
    result = sweep_of(make(crashes))
    assert result.members == () and isinstance(result.failure, SweepFailed)
    assert "stopped at reduce, sums, sum 19x100" in str(result.failure)
    assert "RuntimeError: an illegal memory access" in str(result.failure)


def test_a_process_that_dies_takes_its_problem_with_it(monkeypatch, tmp_path):
    """The problems of other classes are tried again by other processes."""
    (tmp_path / "dying_schedules.py").write_text(_DYING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(tmp_path)
    deadly, sound = verify.sweep(["dying_schedules"], Depth.SMALL, 2)
    assert "its process died" in str(deadly.failure) and not deadly.members
    assert sound.failure is None and sound.members == (sound.single,)


_DYING = """
import os
import torch
from bicompile.sweep import BitClass, Problem

def classes(depth):
    for name, run in (("deadly", lambda x, s: os._exit(3)), ("sound", lambda x, s: x[0] + 1)):
        problem = Problem(name, torch.float32, ((3, 4),), run)
        yield BitClass("reduce", name, "one", ("one",), (problem,))
"""


def test_each_schedule_is_reported_once(sweep_of):
    bit_class = make(splits_the_row, needs_much_memory)
    several = BitClass(
        "reduce", "sums", bit_class.single, bit_class.schedules, bit_class.problems * 3
    )
    assert len(check(several, several.problems[0], "cpu").differences) == 2
    result = sweep_of(several)
    assert [d.schedule for d in result.outcome.differences] == [
        "splits_the_row",
        "needs_much_memory",
    ]
    console = Console(width=200, record=True)
    verify_text.show(console, [result])
    shown = console.export_text()
    assert "1 of 3" in shown and "split" in shown
    assert shown.count("is not in its class") == shown.count("does not run here") == 1


@pytest.mark.parametrize(
    ("schedules", "status"),
    [((), 0), ((needs_much_memory,), 0), ((splits_the_row,), 1), ((splits_the_row, crashes), 2)],
)
def test_exit_status_and_file(monkeypatch, own_certificates, schedules, status):
    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(verify, "_classes", lambda module, depth: [make(*schedules)])
    monkeypatch.setattr(Machine, "here", lambda device: HERE)
    assert cli.main(["verify", "--family", "reduce"]) == status
    path = own_certificates / HERE.file
    found = Certificate.read(path).families["reduce"]
    assert found.sources == certificate.sources("reduce")
    certified = [listing.schedules for listing in found.classes.values()]
    assert certified == ([("honest",)] if status < 2 else [])


def test_quick_writes_nothing(monkeypatch, own_certificates):
    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(verify, "_classes", lambda module, depth: [make()])
    assert cli.main(["verify", "--quick", "--family", "reduce"]) == 0
    assert not own_certificates.exists()
    with pytest.raises(SystemExit):
        cli.main(["verify", "--quick", "--output", "."])


def test_other_families_are_kept(monkeypatch, own_certificates, tmp_path):
    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(verify, "_classes", lambda module, depth: [make()])
    monkeypatch.setattr(Machine, "here", lambda device: HERE)
    there = ["verify", "--output", str(tmp_path), "--family"]
    assert cli.main([*there, "reduce"]) == 0
    before = Certificate.read(tmp_path / HERE.file)
    text = (tmp_path / HERE.file).read_text()
    (tmp_path / HERE.file).write_text(text.replace('"reduce"', '"matmul"'))
    assert cli.main([*there, "reduce"]) == 2  # a damaged one is not built upon
    kept = {"matmul": before.families["reduce"]}
    Certificate(HERE, kept).write(tmp_path)
    assert cli.main([*there, "reduce"]) == 0
    assert Certificate.read(tmp_path / HERE.file).families == {**before.families, **kept}


def test_a_sweep_that_is_stopped_leaves_what_it_has_been_through(monkeypatch, own_certificates):
    def stop(x):
        raise KeyboardInterrupt

    def classes(module, depth):
        family = module.split(".")[2]
        only = make(*[stop] * (family == "softmax"))
        return [dataclasses.replace(only, family=family)]

    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(verify, "_classes", classes)
    monkeypatch.setattr(Machine, "here", lambda device: HERE)
    before = {"softmax": Family("of other sources", {})}
    Certificate(HERE, before).write(own_certificates)
    with pytest.raises(KeyboardInterrupt):
        verify.run(cli_arguments("--family", "rope", "--family", "softmax", "--family", "norm"))
    found = Certificate.read(own_certificates / HERE.file).families
    assert list(found) == ["softmax", "rope"] and found["softmax"] == before["softmax"]
    assert found["rope"].classes["sums"].schedules == ("honest",)


def cli_arguments(*given):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser.parse_args(given)


def test_only_what_is_new_is_tried(monkeypatch, own_certificates):
    tried = []

    def the_same(x):
        tried.append("the_same")
        return honest(x)

    def as_good(x):
        tried.append("as_good")
        return honest(x)

    def like_splits(x):
        return splits_the_row(x)

    def verified(bit_class):
        tried.clear()
        monkeypatch.setattr(verify, "_classes", lambda module, depth: [bit_class])
        status = cli.main(["verify", "--new", "--family", "reduce"])
        found = Certificate.read(own_certificates / HERE.file).families["reduce"].classes
        return status, found["sums"].schedules if found else (), set(tried)

    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(Machine, "here", lambda device: HERE)
    members = "honest", "the_same", "as_good"
    assert verified(make(the_same)) == (0, members[:2], {"the_same"})
    assert verified(make(the_same)) == (0, members[:2], set())
    assert verified(make(the_same, crashes)) == (2, members[:2], set())
    assert verified(make(the_same, splits_the_row, as_good)) == (1, members, {"as_good"})
    # The single schedule has other bits than it had: what was held against them is not listed.
    other_bits = make(the_same, like_splits, single=splits_the_row)
    assert verified(other_bits) == (0, ("splits_the_row", "like_splits"), set())
    monkeypatch.setattr(verify, "sources", lambda family: "others")
    assert verified(make(the_same)) == (0, members[:2], {"the_same"})
