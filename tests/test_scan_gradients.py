"""What goes back through scans: values, and bits of a row."""

from __future__ import annotations

import math

import pytest
import torch
from rewriting import gradient, traced

from bicompile import testing
from bicompile.kernels.scan import op as scan

SCANS = {
    "cumsum": lambda t: t.cumsum(-1),
    "logcumsumexp": lambda t: t.logcumsumexp(-1),
    "logcumsumexp, across": lambda t: t.mT.logcumsumexp(0).mT,
    "cumprod": lambda t: (1 + t / 8).cumprod(-1),
}
TRACED = [name for name in SCANS if name != "cumprod"]  # its gradient writes in place


def problem(rows, length, scale=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t, grad = (torch.randn(rows, length, generator=generator) for _ in range(2))
    return (t * scale).to(dtype), grad.to(dtype)


def compiled(function, t, grad):
    return traced(lambda *p: gradient(function, *p), t, grad)(t, grad)


def ratio(function, length, scale, dtype, draws=8):
    """The root mean square error over that of PyTorch, or over that of rounding if it is larger."""
    squares = torch.zeros(3, dtype=torch.float64)
    for seed in range(draws):
        t, grad = problem(16, length, scale, dtype, seed)
        true = gradient(function, t.double(), grad.double())
        found = compiled(function, t, grad), gradient(function, t, grad), true.to(dtype)
        squares += torch.stack([(f.double() - true).square().sum() for f in found])
    return (squares[0] / squares[1:].max()).sqrt().nan_to_num(0.0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (5, 1.0), (100, 1.0), (300, 20.0)])
@pytest.mark.parametrize("name", TRACED)
def test_errors_are_no_worse_than_pytorchs(name, length, scale, dtype):
    assert ratio(SCANS[name], length, scale, dtype) <= 1.02


def test_a_sum_in_logarithms_has_a_larger_error(monkeypatch):
    """That of PyTorch, whose error is that of the size of the logarithms."""
    function = SCANS["logcumsumexp"]
    assert ratio(function, 100, 3.0, torch.float32) < 0.7
    monkeypatch.setattr(scan, "NEAR", -1.0)
    assert ratio(function, 100, 3.0, torch.float32) > 0.9


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("name", TRACED)
def test_bits_of_a_row(name, scale):
    """A row alone, and among NaN at any place."""
    t, grad = problem(7, 70, scale)
    alone = compiled(SCANS[name], t[:1], grad[:1])
    for count, place in ((2, 1), (5, 0), (7, 6)):
        rows = [torch.full_like(v[:count], torch.nan) for v in (t, grad)]
        for among, v in zip(rows, (t, grad), strict=True):
            among[place] = v[0]
        found = compiled(SCANS[name], *rows)[place : place + 1]
        testing.assert_same_bits(found, alone, f"{place} of {count}")


class _Planted(torch.autograd.Function):
    """Sums scaled by the largest element of the batch."""

    @staticmethod
    def forward(ctx, t):
        y = t.logcumsumexp(-1)
        ctx.save_for_backward(t, y)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        largest = y.amax()
        return (grad * (largest - y).exp()).flip(-1).cumsum(-1).flip(-1) * (x - largest).exp()


def test_a_scale_of_the_batch_is_caught(monkeypatch):
    monkeypatch.setitem(SCANS, "planted", lambda t: _Planted.apply(t))
    with pytest.raises(testing.InvarianceViolation):
        test_bits_of_a_row("planted", 1.0)


@pytest.mark.parametrize(
    "row",
    [
        [-math.inf, -math.inf, 1.0, 2.0],
        [-100.0, 0.0, 100.0, 200.0],
        [3.0, -200.0, -90.0, 1.0],
        [0.0, math.inf, 1.0],
        [0.0, math.nan, 1.0],
        [-math.inf, -math.inf],
    ],
    ids=str,
)
def test_infinities_and_long_ranges_as_in_pytorch(row):
    t, function = torch.tensor([row]), SCANS["logcumsumexp"]
    for grad in (torch.ones_like(t), torch.tensor([[1.0, -2.0, 0.0, 3.0]])[:, : len(row)]):
        expected = gradient(function, t.double(), grad.double()).float()
        torch.testing.assert_close(compiled(function, t, grad), expected, equal_nan=True)


@pytest.mark.soak
def test_by_inductor():
    def total(t):
        return torch.stack([f(t).square().sum() for f in SCANS.values()]).sum()

    t = problem(6, 90)[0]
    one = torch.tensor(1.0)
    both = torch.compile(total, backend="batch_invariant", dynamic=True)
    found = [gradient(both, t[:rows], one) for rows in (6, 3)]
    torch.testing.assert_close(found[0], gradient(total, t, one))
    testing.assert_same_bits(found[0][:3], found[1], "the gradient of a row")
