"""The command line and the bench: refusals, the protocol of the workers, no time for wrong bits."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys

import pytest
import torch
from tiny_model import make_tiny_model

from bicompile import bench, bench_worker, cli, demo
from bicompile.bench_worker import Case
from bicompile.errors import NetworkUnavailable

SETTINGS = {
    "system": "eager",
    "kind": "ops",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "mode": None,
    "model": None,
}


def test_python_m_lists_the_commands():
    command = [sys.executable, "-m", "bicompile", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in cli.COMMANDS:
        assert f"\n    {name} " in shown


def refuse(args):
    raise NetworkUnavailable(model="tiny", output="  ERROR: no index")


def test_error_is_a_panel(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", refuse)
    assert cli.main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert "NetworkUnavailable" in shown
    assert "cannot download tiny" in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(demo, "run", refuse)
    with pytest.raises(NetworkUnavailable):
        cli.main(["demo", "--debug"])


def test_interrupt(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(["demo"]) == 130


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--nothing"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: bicompile" in capsys.readouterr().err


def talk(settings, requests):
    """What a worker answers to some requests, without a process."""
    replies = []
    lines = io.StringIO("".join(json.dumps(r) + "\n" for r in requests))
    bench_worker.serve(settings, lines, replies.append)
    assert replies.pop(0) == "ready"
    return replies


@pytest.mark.parametrize("case", bench.OP_CASES, ids=lambda c: c.name)
def test_ops_of_the_bench_run(case):
    if "49152" in case.group or case.batch > 16:
        case = Case(case.group.replace("49152", "512"), min(case.batch, 4))
    request = {"do": "digests", "case": [case.group, case.batch]}
    (rows,) = talk(SETTINGS, [request])
    assert len(rows) == case.batch


def test_model_cases(tmp_path):
    settings = SETTINGS | {"kind": "model", "model": str(make_tiny_model(tmp_path))}
    decode = ["decode", 2]
    first, fastest, rows, peak = talk(
        settings,
        [
            {"do": "first", "case": decode},
            {"do": "measure", "case": decode, "calls": 2},
            {"do": "digests", "case": ["prefill", 3]},
            {"do": "memory", "case": decode},
        ],
    )
    assert first > 0
    assert fastest > 0
    assert len(set(rows)) == 3
    assert peak > 10


def test_decode_starts_again_when_the_cache_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_worker, "SLOTS", bench_worker.CONTEXT + 3)
    settings = SETTINGS | {"model": str(make_tiny_model(tmp_path))}
    work = bench_worker.ModelWork("eager", settings)
    with torch.no_grad():
        steps = [work.prepare(Case("decode", 1))().clone() for _ in range(4)]
    assert torch.equal(steps[0], steps[3])
    assert not torch.equal(steps[0], steps[1])


class FakeWorker:
    """Answers with given figures; its rows' bits depend on the batch if it is planted."""

    def __init__(self, seconds=1.0, planted=False):
        self.seconds = seconds
        self.planted = planted

    def ask(self, do, case, **more):
        if do == "digests":
            return [
                f"row {i} of {case.batch if self.planted else 'any'}" for i in range(case.batch)
            ]
        return self.seconds


CASES = (Case("mm", 1), Case("mm", 4), Case("softmax", 1))


def test_ratios():
    workers = {"inductor": FakeWorker(2.0), "bicompile": FakeWorker(1.0)}
    wrong = bench.check_bits(workers["bicompile"], CASES)
    rows = list(bench.race(workers, CASES, 2, 1, wrong))
    assert wrong == {}
    assert [row.ratio("inductor") for row in rows] == [0.5, 0.5, 0.5]
    assert rows[0].figures == {"inductor": 2000.0, "bicompile": 1000.0}


def test_no_time_for_wrong_bits():
    workers = {"inductor": FakeWorker(2.0), "bicompile": FakeWorker(1.0, planted=True)}
    wrong = bench.check_bits(workers["bicompile"], CASES)
    assert wrong == {"mm": "bits of a row differ at batch 4"}
    rows = list(bench.race(workers, CASES, 2, 1, wrong))
    assert ["bicompile" in row.figures for row in rows] == [False, False, True]
    assert rows[0].ratio("inductor") is None


def test_a_worker_that_cannot_start_says_why():
    worker = bench.Worker(SETTINGS | {"kind": "model", "model": "/no/such"}, "/tmp")
    said = pytest.raises(bench.WorkerFailed, match="cannot load the model /no/such")
    with said, worker.running():
        pass


def test_every_command_declares_its_options():
    parser = cli.make_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(actions[0].choices) == set(cli.COMMANDS)
