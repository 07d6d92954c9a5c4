"""The search for hours: what it finds, and that it goes on where it was killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import planted_ops  # noqa: F401
import pytest

from bicompile import cli, errors, registry
from bicompile.soak import page, subjects, work
from bicompile.soak.state import Block, Failure, State
from bicompile.testing import InvarianceViolation, assert_op_invariant
from bicompile.testing.plan import plan

HERE = Path(__file__).parent
SUM = registry.load_all()["sum"].contract
LOADED = ("--load", "planted_ops", "--jobs", "1")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Processes find the planted ops."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


def soak(*arguments):
    return cli.main(["soak", *map(str, arguments)])


# ---------------------------------------------------------------------------------------- cases


def test_every_op_holds():
    for name in subjects.ops():
        if not name.startswith("planted"):
            assert_op_invariant(name, cases=12)


def test_cases_that_are_alike_need_the_same_kernels():
    """A block on a GPU: other rows, contents and numbers, one dtype, law and length of sums."""
    for begin in (0, 256):
        cases = [plan("sum", SUM, n, 256) for n in range(begin, begin + 256)]
        same = {(c.law, c.case, c.dtype, c.sizes["K"]) for c in cases}
        assert len(same) == 1
        assert 1 < len({c.sizes["M"] for c in cases}) <= 3
        assert len({(c.contents, c.seed) for c in cases}) > 200
    dtypes = {plan("sum", SUM, n, 256).dtype for n in range(0, 5120, 256)}
    assert len(dtypes) == 3


def test_a_model_holds():
    assert subjects.check("MLP", 0, "cpu") == ("batch size", "")


# ------------------------------------------------------------------------------------- the state


def test_blocks_come_once_and_in_rounds():
    done = {"sum": {0, 2}}
    tasks = list(itertools.islice(work.endless(["sum", "mm", "MLP"], done, "cpu"), 6))
    assert tasks == [("mm", 0), ("MLP", 0), ("sum", 1), ("mm", 1), ("mm", 2), ("sum", 3)]
    assert list(itertools.islice(work.endless(["MLP"], {}, "cpu"), 2)) == [("MLP", 0), ("MLP", 1)]


def test_a_block_counts_once_or_not_at_all(tmp_path):
    file = tmp_path / "state.db"
    state = State(file, {"torch": "1"})
    twice = Failure("sum", 3, "law", "one"), Failure("sum", 3, "law", "two")
    with pytest.raises(sqlite3.IntegrityError):
        state.add(Block("sum", 0, {"law": 64}, 1.0, twice))
    assert state.cases == 0 and not state.done()
    state.add(Block("sum", 0, {"law": 63, "other": 1}, 1.0, twice[:1]))
    again = State(file, {"torch": "1"})
    assert again.cases == 64 and again.done() == {"sum": {0}}
    assert again.counts() == {"sum": Counter({"law": 63, "other": 1})}
    assert again.failures() == [twice[0]]
    assert again.rates() == {"sum": 64.0}
    with pytest.raises(errors.StateDiffers, match="torch: 1, here 2"):
        State(file, {"torch": "2"})


def test_a_process_that_dies_is_found():
    block = work._lost("sum", 2, "cpu", EOFError("died"))
    assert block.failures[0].number == 128
    assert "--case 'sum@NUMBER'" in block.failures[0].message


OPENED_SINCE = {"log_softmax", "log_softmax_backward", "log_softmax_gather"}
"""Ops that older records have searched, and that are opened into others now."""


@pytest.mark.parametrize("name", ["soak", "soak-h200", "soak-h200-2"])
def test_a_page_shows_its_record(name):
    file = HERE.parent / "docs" / f"{name}.json"
    summary = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == page.render(summary, file.name)
    assert not summary["failures"]
    assert {*summary["subjects"]} - OPENED_SINCE <= {*subjects.ops(), *subjects.MODELS}


# ----------------------------------------------------------------------------------- the command


def test_killed_it_goes_on(tmp_path):
    """Killed in the middle, continued until 1500 cases: none is lost, none comes twice."""
    state, report, shown = (tmp_path / name for name in ("state.db", "soak.json", "soak.md"))
    names = ["--only", "planted::honest", "planted::small_batches", *LOADED, "--state", state]
    command = [sys.executable, "-m", "bicompile", "soak", *map(str, names), "--minutes", "5"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while _cases(state) < 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = _cases(state)
    assert before >= 200
    assert soak(*names, "--cases", before + 300, "--json", report, "--page", shown) == 1
    found = json.loads(report.read_text())
    assert shown.read_text() == page.render(found, report.name)
    assert before + 300 <= found["cases"] <= before + 300 + 4 * subjects.OF_OPS["cpu"]
    assert found["cases"] == sum(sum(laws.values()) for laws in found["subjects"].values())
    done = State(state, {}).done()
    for blocks in done.values():
        assert sorted(blocks) == list(range(len(blocks))), "a block was left out"
    broken = {f["subject"] for f in found["failures"]}
    assert broken == {"planted::small_batches"}
    numbers = [f["number"] for f in found["failures"]]
    assert len(set(numbers)) == len(numbers)
    case = f"planted::small_batches@{numbers[0]}"
    assert soak("--case", case, *LOADED) == 1
    with pytest.raises(InvarianceViolation):
        exec("from bicompile" + found["failures"][0]["message"].split("from bicompile")[1])


def _cases(state):
    try:
        with sqlite3.connect(f"file:{state}?mode=ro", uri=True) as connection:
            (count,) = connection.execute("SELECT sum(cases) FROM blocks").fetchone()
            return count or 0
    except sqlite3.OperationalError:
        return 0


def test_a_case_that_holds_says_so(capsys):
    assert soak("--case", "planted::honest@3", *LOADED) == 0
    assert "holds" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys):
    assert soak("--only", "nothing") == 2
    assert "no op or model 'nothing'" in capsys.readouterr().err
