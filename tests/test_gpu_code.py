"""What Inductor makes on a GPU of the rest of a decode step; no GPU is needed to see it."""

from __future__ import annotations

import re

import pytest
from gpu_code import generated
from subject import Subject

from bicompile import inductor
from bicompile.bench.cases import Shapes
from bicompile.bench.random_model import build

SHAPES = Shapes(2, hidden=64, intermediate=96, heads=8, kv_heads=4, head_size=128, vocabulary=97)


@pytest.mark.parametrize("batch", [1, 8])
def test_keys_and_values_go_into_their_caches_by_one_kernel(batch, monkeypatch):
    subject = Subject(build(SHAPES, "cpu", "bfloat16"), 9, dynamic=False)
    cache = subject.static_cache(batch, 1 << 12)
    keys = cache.layers[0].keys
    assert keys.numel() * keys.element_size() > inductor.LITTLE  # as caches are in use
    x = subject.random(batch, 1)
    code = generated(lambda: subject(x, cache=cache, start=9), monkeypatch)
    stores = re.findall(r"triton_\w*index_copy\w*\.run\(", code)
    assert len(stores) == len(cache.layers)
