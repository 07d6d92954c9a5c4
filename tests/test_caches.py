"""Compiled graphs kept on disk: ours are never plain Inductor's, and a warm start knows all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).eval()
x = torch.randn(8, 64)
with torch.no_grad():
    y = torch.compile(model, backend=sys.argv[1])(x)
    ours = torch.equal(torch.compile(model, backend=sys.argv[1])(x[:1]), y[:1])
hits = counters["aot_autograd"]["autograd_cache_hit"]
decisions, cached = -1, False
if sys.argv[1] == "batch_invariant":
    from bicompile.report import REPORTS
    decisions, cached = len(REPORTS[0].decisions), REPORTS[0].cached
print("RESULT", hits, decisions, y.flatten().view(torch.int32).sum().item(), ours, cached)
"""


def run(backend, folder):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, backend]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    hits, decisions, digest, ours, cached = out.split("RESULT ")[1].split()
    return int(hits), int(decisions), int(digest), ours == "True", cached == "True"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What a first process prints, by backend, and a copy of what it leaves on the disk."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("batch_invariant", "inductor")}
    printed = {name: run(name, folder) for name, folder in folders.items()}

    def first(backend, folder):
        shutil.copytree(folders[backend], folder, dirs_exist_ok=True)
        return printed[backend]

    return first


def test_second_process_is_warm_and_knows_the_decisions(first, tmp_path):
    cold, warm = first("batch_invariant", tmp_path), run("batch_invariant", tmp_path)
    assert cold[0] == 0
    assert warm[0] == 2, "both graphs come from the disk"
    assert warm[1] == cold[1] > 0, "the report is read back"
    assert warm[4] and not cold[4]
    assert warm[3] and cold[3]
    assert warm[2] == cold[2]


@pytest.mark.parametrize("backend", ["batch_invariant", "inductor"])
def test_the_other_backend_was_first(backend, first, tmp_path):
    alone = first(backend, tmp_path / "alone")
    first("inductor" if backend == "batch_invariant" else "batch_invariant", tmp_path / "other")
    after = run(backend, tmp_path / "other")
    assert after[0] == 0
    assert after[1:] == alone[1:]


def test_lost_report_is_made_anew(first, tmp_path):
    cold = first("batch_invariant", tmp_path)
    for file in (tmp_path / "bicompile").iterdir():
        file.unlink()
    again = run("batch_invariant", tmp_path)
    assert again[1:] == cold[1:]


def test_half_written_report_is_not_read(first, tmp_path):
    cold = first("batch_invariant", tmp_path)
    for file in (tmp_path / "bicompile").iterdir():
        file.write_text(file.read_text()[:-20])
    again = run("batch_invariant", tmp_path)
    assert again[1:] == cold[1:]
