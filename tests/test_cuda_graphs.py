"""CUDA graphs, one for each batch size or with dynamic shapes, give the bits of plain launches."""

from __future__ import annotations

import pytest
import torch
from subject import check_batches
from test_models import compiled

from bicompile import testing

pytestmark = pytest.mark.gpu
GRAPHS = {"mode": "reduce-overhead"}


def decoded(subject, batch, steps=4):
    """Logits of the followed row, decoded in a batch over a static cache."""
    x = subject.random(batch, subject.length)
    x[-1] = subject.row[0]
    cache = subject.static_cache(batch, 128)
    first = subject.length - steps
    out = [subject(x[:, :first], cache=cache)[-1:]]
    for i in range(first, subject.length):
        out.append(subject(x[:, i : i + 1], cache=cache, start=i)[-1:])
    return torch.cat(out, 1)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_batches(name, dynamic):
    plain = compiled(name, torch.bfloat16, "cuda")
    subject = compiled(name, torch.bfloat16, "cuda", dynamic=dynamic, **GRAPHS)
    for _ in range(3):  # warm-up, recording, replay
        testing.assert_same_bits(subject(subject.row), plain.reference, "alone")
        check_batches(subject, (2, 3))


def test_decode():
    subject = compiled("qwen3", torch.bfloat16, "cuda", **GRAPHS)
    for batch in (1, 2, 3, 8, 2, 1):
        for run in range(3):
            subject.expect(decoded(subject, batch), f"batch of {batch}, run {run}")


def test_graphs_are_recorded():
    """Nothing in our graphs makes Inductor leave CUDA graphs out."""
    from torch._dynamo.utils import counters

    counters.clear()
    subject = compiled("qwen3", torch.bfloat16, "cuda", **GRAPHS)
    decoded(subject, 2)
    assert counters["inductor"]["cudagraph_skips"] == 0
