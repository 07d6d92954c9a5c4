"""Shared set-up: hypothesis profiles, poisoned memory, one C++ build for all workers."""

from __future__ import annotations

import os

# One thread for each worker of pytest-xdist: threads that outnumber the cores wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from bicompile import certificate

hypothesis.settings.register_profile("dev", max_examples=10, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=10, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile(
    "quick", max_examples=2, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("soak", max_examples=500, deadline=None, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev")
hypothesis.settings.load_profile(PROFILE)

LONGEST = ("test_in_the_interpreter", "test_every_function_is_invariant_in_float32")


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU, the real model or much time, unless it is asked for by name."""
    chosen = config.getoption("-m") or ""
    absent = [m for m in ("gpu", "soak", "real") if m not in chosen]
    left_out = [i for i in items if any(i.get_closest_marker(m) for m in absent)]
    config.hook.pytest_deselected(items=left_out)
    # The longest first: no process is left with them in the end.
    kept = [i for i in items if i not in set(left_out)]
    items[:] = sorted(kept, key=lambda i: not i.name.startswith(LONGEST))


@pytest.fixture
def poisoned_memory():
    """Fill uninitialised memory with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _fresh_dynamo(request):
    """No compiled function of one test serves another."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def whole_table(monkeypatch):
    """Every schedule of the tables is used, certified or not."""
    monkeypatch.setattr(certificate, "permits", lambda *_: True)


@pytest.fixture
def fast_double_or_not(request, monkeypatch):
    """A test of kind "ieee" runs as on a device that is slow in float64."""
    found = getattr(request.node, "callspec", None)
    if found and found.params.get("kind") == "ieee":
        monkeypatch.setattr("bicompile.kernels.matmul.schedules.FAST_DOUBLE", ())


@pytest.fixture
def own_certificates(tmp_path, monkeypatch):
    """An empty folder for certificates; no others count."""
    for name, folder in (("USER", "user"), ("PACKAGED", "packaged")):
        monkeypatch.setattr(certificate, name, tmp_path / folder)
    certificate.forget()
    yield tmp_path / "user"
    certificate.forget()
