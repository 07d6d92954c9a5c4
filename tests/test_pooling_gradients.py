"""What goes back through pooling and folding: values, and bits of a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import gradient, traced, x
from test_decompositions import IMAGES, NOT_IN_HALF, error, sample

from bicompile import capture, pooling, testing

aten = torch.ops.aten
MAXIMA = {
    "max_pool1d": lambda t: F.max_pool1d(t.flatten(1, 2), 3, 2),
    "max_pool2d": lambda t: F.max_pool2d(t, 3, 2, 1),
    "max_pool2d, apart": lambda t: F.max_pool2d(t, 2, 3),
    "max_pool2d, to the end": lambda t: F.max_pool2d(t, (3, 2), 2, ceil_mode=True),
    "max_pool2d, of one image": lambda t: F.max_pool2d(t[0], 3, 1),
    "max_pool3d": lambda t: F.max_pool3d(t, 2, 1),
    "adaptive_max_pool2d": lambda t: F.adaptive_max_pool2d(t[..., :12, :16], (4, 8)),
    "adaptive_max_pool2d, to one": lambda t: F.adaptive_max_pool2d(t, 1),
    "lp_pool2d": lambda t: F.lp_pool2d(t, 2.0, 2),
}
EVERY = {**IMAGES, **MAXIMA}
CASES = [(n, d) for n in EVERY for d in (torch.float32, torch.bfloat16)]
CASES = [c for c in CASES if c[1] is torch.float32 or c[0] not in NOT_IN_HALF]


def problem(name, dtype=torch.float32, rows=6):
    """A function of images, images, and the gradient of the result."""
    t = sample("avg_pool2d", dtype, rows)
    return EVERY[name], t, x(*EVERY[name](t).shape, dtype=dtype)


def compiled(function, t, grad):
    return traced(lambda *p: gradient(function, *p), t, grad)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values(name, dtype):
    """As exact as PyTorch's."""
    function, t, grad = problem(name, dtype, 24)
    result = compiled(function, t, grad)(t, grad)
    eager = gradient(function, t, grad)
    true = gradient(function, t.double(), grad.double())
    assert result.shape == eager.shape and result.dtype == eager.dtype
    assert error(result, true) <= error(eager, true) * 1.01


def check_rows(name):
    """A row alone, and among NaN at any place, in graphs of any number of rows."""
    function, t, grad = problem(name)
    alone = compiled(function, t[:1], grad[:1])(t[:1], grad[:1])
    for count, place in ((2, 1), (5, 0), (6, 5)):
        rows = [torch.full_like(v[:count], torch.nan) for v in (t, grad)]
        for among, v in zip(rows, (t, grad), strict=True):
            among[place] = v[0]
        found = compiled(function, *rows)(*rows)[place : place + 1]
        testing.assert_same_bits(found, alone, f"{place} of {count}")


EACH = [n for n in EVERY if n != "max_pool2d, of one image"]


@pytest.mark.soak
@pytest.mark.parametrize("name", EACH)
def test_bits_of_a_row(name):
    check_rows(name)


def adds_up_halves_of_windows(grad, x, *how):
    """In a batch of more than two."""
    windows = pooling.max_pool_backward(2)
    if len(x) <= 2:
        return windows(grad, x, *how)
    first = torch.arange(grad.shape[-1], device=grad.device) % 2 == 0
    parts = [windows(grad.where(first == half, 0.0), x, *how) for half in (True, False)]
    return parts[0] + parts[1]


def divides_at_the_end(grad, x, *how):
    """In a batch of more than two."""
    windows = pooling.avg_pool_backward(2)
    return windows(grad * 9, x, *how) / 9 if len(x) > 2 else windows(grad, x, *how)


PLANTED = {
    "max_pool2d": (aten.max_pool2d_with_indices_backward.default, adds_up_halves_of_windows),
    "avg_pool2d": (aten.avg_pool2d_backward.default, divides_at_the_end),
}


@pytest.mark.parametrize("name", PLANTED)
def test_an_order_that_depends_on_the_batch_is_caught(name, monkeypatch):
    op, planted = PLANTED[name]
    table = capture._Table({**capture.decomposition_table(), op: planted})
    monkeypatch.setattr(capture, "decomposition_table", lambda: table)
    with pytest.raises(testing.InvarianceViolation):
        check_rows(name)


@pytest.mark.soak
def test_modules():
    """Forward and backward by Inductor, for any number of images."""

    def total(t):
        names = ("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "max_pool2d, apart")
        return torch.stack([EVERY[name](t).square().sum() for name in names]).sum()

    compile = torch.compile(total, backend="batch_invariant", dynamic=True)
    t = sample("avg_pool2d", torch.float32)
    found = [gradient(compile, t[:n], torch.tensor(1.0)) for n in (6, 3)]
    torch.testing.assert_close(found[0], gradient(total, t, torch.tensor(1.0)))
    testing.assert_same_bits(found[0][:3], found[1], "the gradient of a row")
