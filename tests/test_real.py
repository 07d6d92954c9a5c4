"""The promise on the real model, all layers (`pytest -m real`, some minutes for each dtype)."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subject import (
    Subject,
    check_batches,
    check_caches,
    check_padding,
    check_prefix,
    check_threads,
    check_token_by_token,
)

from bicompile import models, testing

pytestmark = pytest.mark.real
LENGTH = 93
DTYPES = ("bfloat16", "float32", "float16")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def real(dtype, device, **kwargs):
    model, _ = models.load(dtype=getattr(torch, dtype), device=device)
    return Subject(model, LENGTH, **kwargs)


@pytest.fixture(scope="module")
def subjects():
    """One at a time: what is compiled for one check serves the next."""
    return functools.lru_cache(maxsize=1)(real)


def digest(logits):
    return hashlib.sha256(testing.bits(logits.cpu()).numpy().tobytes()).hexdigest()


OTHER_PROCESS = """
import sys
from test_real import digest, real
print(digest(real(*sys.argv[1:]).reference))
"""


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Keep what is compiled: unlike elsewhere, tests here share a model."""


@each_device
@each_dtype
@pytest.mark.parametrize(
    "check",
    [check_batches, check_padding, check_caches, check_token_by_token, check_prefix],
    ids=lambda f: f.__name__,
)
def test_a_row(subjects, dtype, device, check):
    check(subjects(dtype, device))


@each_dtype
def test_threads(subjects, dtype):
    check_threads(subjects(dtype, "cpu"))


@each_device
@each_dtype
def test_another_process(subjects, dtype, device):
    """It has one thread and finds other things in its memory and caches."""
    result = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, dtype, device],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split()[-1] == digest(subjects(dtype, device).reference)


@each_device
def test_static_and_dynamic_graphs_agree(subjects, device):
    reference = subjects("bfloat16", device).reference
    for dynamic in (False, True):
        other = real("bfloat16", device, dynamic=dynamic)
        testing.assert_same_bits(other.reference, reference, f"dynamic={dynamic}")
