"""Attention as models vary it: caps, sinks, windows that roll, biases, score functions.

Tiny random models; each is followed alone, in batches, padded, in chunks and through caches.
"""

from __future__ import annotations

import pytest
import torch

from bicompile import native, registry, testing

SDPA = registry.load_all()["sdpa"]
CAPPED = SDPA.contract.cases[2]


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


# ------------------------------------------------------------------------------ planted variants


def cap_of_one_query_is_another_function(q, k, v, mask, causal, scale, cap, sinks):
    if q.shape[2] == 1:
        cap *= 1 + 2**-10
    return SDPA.op(q, k, v, mask, causal, scale, cap, sinks)


def cap_follows_the_largest_score(q, k, v, mask, causal, scale, cap, sinks):
    return SDPA.op(q, k, v, mask, causal, scale, cap + float(q.float().norm()) * 2**-10, sinks)


def sink_is_counted_for_each_batch_row(q, k, v, mask, causal, scale, cap, sinks):
    if sinks is not None:
        sinks = sinks + len(q)
    return SDPA.op(q, k, v, mask, causal, scale, cap, sinks)


def sinks_go_by_the_number_of_heads(q, k, v, mask, causal, scale, cap, sinks):
    if sinks is not None:
        sinks = sinks.mean().expand(q.shape[1])
    return SDPA.op(q, k, v, mask, causal, scale, cap, sinks)


@pytest.mark.parametrize(
    "variant",
    [
        cap_of_one_query_is_another_function,
        cap_follows_the_largest_score,
        sink_is_counted_for_each_batch_row,
        sinks_go_by_the_number_of_heads,
    ],
)
def test_planted_variants_are_caught(variant):
    sizes = {"B": 3, "H": 2, "Q": 9, "S": 33, "D": 16}
    sample = testing.make_sample(SDPA, CAPPED, torch.float32, sizes)
    with pytest.raises(testing.InvarianceViolation):
        for law in testing.kernels.PROPERTIES:
            law(variant, sample)
