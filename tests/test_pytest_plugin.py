"""The pytest plugin in a project of its own, from the built wheel, with two workers of xdist."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bicompile import pytest_plugin
from bicompile.testing.search import PROFILES

ROOT = Path(__file__).parent.parent

USES_IT = """
import pytest
import torch

import bicompile
from bicompile.testing import InvarianceViolation


def rows(batch_size):
    return {"x": torch.ones(batch_size, 4)}


def from_the_position(x):
    return x + (torch.arange(len(x)) == 2)[:, None] * 2.0**-20


def test_it_is_the_wheel():
    assert bicompile.__file__.startswith(SITE)


def test_all_properties(batch_invariant):
    batch_invariant(torch.nn.Tanh(), lambda b: {"input": torch.ones(b, 4)}, backend="eager")


@pytest.mark.batch_invariant("batch size", "position", "strides", backend="eager")
def test_each_property(batch_invariant):
    batch_invariant(from_the_position, rows)


@pytest.mark.batch_invariant(backend="eager", max_batch_size=9)
class TestOptionsOfAClass:
    @pytest.mark.batch_invariant(max_batch_size=2)
    def test_own_options_come_first(self, batch_invariant):
        batch_invariant(from_the_position, rows)  # its fault needs three rows

    def test_options_of_a_call_come_first(self, batch_invariant):
        batch_invariant(from_the_position, rows, max_batch_size=2)

    def test_options_of_the_class(self, batch_invariant):
        with pytest.raises(InvarianceViolation):
            batch_invariant(from_the_position, rows)


@pytest.mark.batch_invariant("repeated run", backend="eager")
def test_profile(batch_invariant):
    calls = []
    batch_invariant(lambda x: calls.append(x) or x, rows)
    assert len(calls) == 2 * 2  # two runs of a quarter of 5 cases


@pytest.mark.batch_invariant(backend="eager")
def test_nothing_reads_the_marker():
    pass
"""

UNUSED = """
import sys


def test_nothing_heavy_is_imported():
    import bicompile

    assert bicompile.__file__.startswith(SITE)
    assert not {"torch", "bicompile.testing"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with tests, and a function that runs pytest on one of them."""
    folder = tmp_path_factory.mktemp("sample")
    site, home = folder / "site", folder / "project"
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "-q"]
    # From a copy: another test may build in the same place at the same time.
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "build", "docs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    subprocess.run([*pip, "--target", site, source], check=True)
    (home / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    for name, text in (("test_uses_it.py", USES_IT), ("test_unused.py", UNUSED)):
        (home / name).write_text(f"SITE = {str(site)!r}\n{text}")

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


def test_sample_project(project):
    shown = project(
        "test_uses_it.py", "-n", "2",
        "--batch-invariant-profile", "dev", "--batch-invariant-device", "cpu",
    )  # fmt: skip
    outcomes = {
        name: outcome
        for outcome, name in re.findall(
            r"\[gw\d\] .*?(PASSED|FAILED|ERROR) test_uses_it.py::(.+?) *$", shown, re.MULTILINE
        )
    }
    expected = {
        "test_it_is_the_wheel": "PASSED",
        "test_all_properties": "PASSED",
        "test_each_property[batch size]": "FAILED",
        "test_each_property[position]": "FAILED",
        "test_each_property[strides]": "PASSED",
        "TestOptionsOfAClass::test_own_options_come_first": "PASSED",
        "TestOptionsOfAClass::test_options_of_a_call_come_first": "PASSED",
        "TestOptionsOfAClass::test_options_of_the_class": "PASSED",
        "test_profile[repeated run]": "PASSED",
        "test_nothing_reads_the_marker": "ERROR",
    }
    assert outcomes == expected, shown
    assert "position: other bits with all rows moved on by" in shown
    assert "the marker batch_invariant is for tests that call the fixture" in shown


def test_nothing_heavy_is_imported_where_it_is_not_used(project):
    shown = project("test_unused.py")
    assert "1 passed" in shown, shown


def test_an_absent_gpu_is_an_error(project):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    shown = project("test_uses_it.py", "-k", "strides", "--batch-invariant-device", "cuda")
    assert "--batch-invariant-device=cuda: PyTorch sees no NVIDIA GPU" in shown


def test_modules_and_inputs_are_moved():
    def make_inputs(batch, length):
        return {"x": torch.ones(batch, length), "name": "x"}

    module, made = pytest_plugin._on("meta", torch.nn.Linear(2, 2), make_inputs)
    assert module.weight.device.type == made(1, length=2)["x"].device.type == "meta"
    assert "length" in inspect.signature(made).parameters


def test_profiles_are_those_of_the_search():
    assert tuple(PROFILES) == pytest_plugin.PROFILES
