"""The example of reinforcement learning: sampler and trainer agree, a killed run goes on."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import make_tiny_model

FILE = Path(__file__).parent.parent / "examples" / "on_policy_rl.py"
STEPS = 3


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    model = str(make_tiny_model(folder / "tiny"))
    fixed = ["--model", model, "--problems", "3", "--group", "4", "--learning-rate", "0.01"]
    fixed += ["--steps", str(STEPS), "--backend", "bicompile"]

    def run(*options):
        report = folder / "report.json"
        status = example.main([*fixed, "--json", str(report), *options])
        return status, json.loads(report.read_text())

    return run


def test_sampler_and_trainer_agree(run, tmp_path):
    status, unbroken = run("--output", str(tmp_path))
    assert status == 0
    assert [(s["kl"], s["largest_difference"], s["other_bits"]) for s in unbroken["steps"]] == [
        (0.0, 0.0, 0)
    ] * STEPS
    assert all(s["tokens"] > 0 for s in unbroken["steps"])
    assert any(s["reward"] > 0 for s in unbroken["steps"])  # or nothing is learnt
    with (tmp_path / "on_policy_rl.csv").open() as file:
        assert [float(r["reward"]) for r in csv.DictReader(file)] == [
            s["reward"] for s in unbroken["steps"]
        ]
    assert (tmp_path / "on_policy_rl.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_a_killed_run_goes_on(example, run, tmp_path, monkeypatch):
    _, unbroken = run("--output", str(tmp_path))
    keep = ("--checkpoint", str(tmp_path / "kept"), "--save-every", "1")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        train, steps = example.Policy.train, iter([None, None, killed])
        patch.setattr(example.Policy, "train", lambda *a: (next(steps) or train)(*a))
        run(*keep)
    kept = torch.load(tmp_path / "kept" / "bicompile.pt")
    assert kept["rows"] == unbroken["steps"][:2]
    _, resumed = run(*keep)
    assert resumed["steps"] == unbroken["steps"]
    assert resumed["weights"] == unbroken["weights"]
    with pytest.raises(SystemExit, match="other settings"):
        run(*keep, "--seed", "1")


def test_differences_are_counted(example):
    """A log-probability of other bits is seen, however close it is."""
    sampler = torch.tensor([-1.0, -2.0, -0.0])
    samples = [example.Sample([1], [2, 3, 4], sampler)]
    same = example.compare(samples, [sampler.clone()])
    assert same == {"kl": 0.0, "largest_difference": 0.0, "other_bits": 0, "tokens": 3}
    near = torch.nextafter(sampler, torch.tensor(-9.0))
    seen = example.compare(samples, [near])
    assert seen["other_bits"] == 3 and seen["kl"] > 0 and 0 < seen["largest_difference"] < 1e-6


def test_rewards_and_advantages(example):
    problem = example.Problem(3, 4)
    answers = (" 7\n", "7", "7.", " 8", "seven", "= 7", "")
    assert [problem.reward(a) for a in answers] == [1.0, 1.0, 0.1, 0.1, 0.0, 0.0, 0.0]
    samples = [example.Sample([], [], torch.empty(0), r) for r in (1.0, 0.0, 0.5, 0.5)]
    example.give_advantages(samples, 2)
    assert samples[0].advantage == -samples[1].advantage > 0.9
    assert samples[2].advantage == samples[3].advantage == 0.0
    assert list(map(list, example.cut([1, 2, 3, 4, 5], (2, 1)))) == [[1, 2], [3], [4, 5]]


def test_every_option_is_documented():
    page = (FILE.parent.parent / "docs" / "training.md").read_text()
    options = re.findall(r'add\("(--[\w-]+)"', FILE.read_text())
    assert len(options) > 10
    assert [o for o in options if f"| `{o}" not in page] == []
