"""Gradients of the matrices of experts: a run's by its rows, in parts of one length, in order."""

from __future__ import annotations

import importlib

import pytest
import torch
from rewriting import traced

from bicompile import testing

importlib.import_module("transformers.integrations.moe")  # defines the op
BACKWARD = torch.ops.transformers.grouped_mm_fallback_backward.default
ours = torch.ops.bicompile
ENDS = {"few": [0, 13, 13, 30], "many": [300, 301, 1300, 1490], "none": [0, 0, 0, 0]}


def backward(*problem):
    return tuple(BACKWARD(*problem))


def problem(ends, seed=0, dtype=torch.float32, behind=10):
    """Rows, matrices, ends of runs, gradients; some rows behind the last run."""
    generator = torch.Generator().manual_seed(seed)
    rows = ends[-1] + behind
    shapes = (rows, 24), (4, 24, 17), (rows, 17)
    x, w, g = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, w, torch.tensor(ends, dtype=torch.int32), g


def compiled(*problem):
    return traced(backward, *problem)(*problem)


def error(found, true):
    return (found.double() - true).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", ["few", "many"])
def test_errors_are_no_worse_than_pytorchs(ends, dtype):
    errors = []
    for seed in range(4):
        x, w, offs, g = problem(ENDS[ends], seed, dtype)
        true = backward(x.double(), w.double(), offs, g.double())
        for a, b, c in zip(compiled(x, w, offs, g), backward(x, w, offs, g), true, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            errors.append([error(v, c) for v in (a, b, c.to(dtype))])
    ours, eager, rounding = torch.tensor(errors).view(4, -1, 3).mean(0).unbind(-1)
    assert (ours <= 1.02 * eager.maximum(rounding)).all(), (ours, eager, rounding)


def check_runs(gradients):
    """A run's gradient is the sum of products of 256 rows, whatever the other runs hold."""
    x, w, offs, g = problem(ENDS["many"])
    found = gradients(x, w, offs, g)[1]
    begin = 0
    for matrix, end in zip(found, offs.tolist(), strict=True):
        parts = zip(x[begin:end].split(256), g[begin:end].split(256), strict=True)
        products = torch.stack([ours.mm(a.t().contiguous(), b, False) for a, b in parts])
        total = products.double().cumsum(0)[-1].float()
        testing.assert_same_bits(matrix, total, f"rows {begin} to {end}")
        begin = end
    x, g = x.clone(), g.clone()
    x[300:301], g[1490:] = torch.nan, torch.nan
    others = gradients(x, w, offs, g)[1][[0, 2, 3]]
    testing.assert_same_bits(others, found[[0, 2, 3]], "beside NaN")


def check_threads(gradients):
    p = problem(ENDS["many"])
    expected = gradients(*p)
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            testing.assert_same_bits(gradients(*p), expected, f"{threads} threads")


def test_runs():
    check_runs(compiled)
    check_threads(compiled)
    assert not any(found.any() for found in compiled(*problem(ENDS["none"], behind=0)))


def test_static_and_dynamic_graphs_agree():
    dynamic = traced(backward, *problem(ENDS["many"]), tracing_mode="symbolic")
    for ends in (ENDS["many"], ENDS["few"]):
        p = problem(ends)
        testing.assert_same_bits(dynamic(*p), compiled(*p), "any number of rows")


def parts_that_begin_anywhere(x, w, offs, g):
    """Parts are counted from the first row of all, not of a run."""
    run = torch.searchsorted(offs, torch.arange(len(x), dtype=torch.int32), right=True)
    found = [
        sum(
            (x[i : i + 256] * (run[i : i + 256] == n)[:, None]).t() @ g[i : i + 256]
            for i in range(0, len(x), 256)
        )
        for n in range(len(w))
    ]
    return None, torch.stack(found)


def parts_of_threads(x, w, offs, g):
    size = -(-len(x) // torch.get_num_threads())
    found = 0
    for i in range(0, len(x), size):
        part = slice(i, i + size)
        found += compiled(x[part], w, (offs - i).clamp(0, len(x[part])), g[part])[1]
    return None, found


def test_planted_variants_are_caught():
    with pytest.raises(testing.InvarianceViolation):
        check_runs(parts_that_begin_anywhere)
    with pytest.raises(testing.InvarianceViolation):
        check_threads(lambda *p: (p[0], parts_of_threads(*p)[1]))
