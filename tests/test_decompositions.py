"""Pooling, folding and distances opened into what we own: values, exactness, and bits of a row."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from rewriting import rewrite, x

from bicompile import capture, pooling, testing

IMAGES = {
    "avg_pool1d": lambda t: F.avg_pool1d(t.flatten(1, 2), 5, 2),
    "avg_pool2d": lambda t: F.avg_pool2d(t, 3, 2),
    "avg_pool2d, padded": lambda t: F.avg_pool2d(t, (3, 5), (2, 1), (1, 2)),
    "avg_pool2d, padding not counted": lambda t: F.avg_pool2d(t, 3, 2, 1, count_include_pad=False),
    "avg_pool2d, to the end": lambda t: F.avg_pool2d(t, 4, 3, 1, ceil_mode=True),
    "avg_pool2d, to the end, not counted": lambda t: F.avg_pool2d(t, 4, 3, 1, True, False),
    "avg_pool2d, another divisor": lambda t: F.avg_pool2d(t, 3, 3, divisor_override=7),
    "avg_pool2d, long": lambda t: F.avg_pool2d(t.repeat(1, 1, 1, 9), (2, 70), 1),
    "avg_pool3d": lambda t: F.avg_pool3d(t, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool1d": lambda t: F.adaptive_avg_pool1d(t.flatten(1, 2), 4),
    "adaptive_avg_pool2d": lambda t: F.adaptive_avg_pool2d(t, (3, 4)),
    "adaptive_avg_pool2d, long": lambda t: F.adaptive_avg_pool2d(t.repeat(1, 1, 1, 9), (2, 2)),
    "adaptive_avg_pool3d": lambda t: F.adaptive_avg_pool3d(t, (2, 5, 1)),
    "local_response_norm": lambda t: F.local_response_norm(t, 3),
    "fold": lambda t: F.fold(F.unfold(t, 3, 1, 2, 2), (13, 17), 3, 1, 2, 2),
    "fold, dilated": lambda t: F.fold(F.unfold(t, (2, 3), 2), (13, 17), (2, 3), 2),
}
MAXIMA = {
    "adaptive_max_pool1d": lambda t: F.adaptive_max_pool1d(t.flatten(1, 2), 4, True),
    "adaptive_max_pool2d": lambda t: F.adaptive_max_pool2d(t, (3, 4), True),
    "adaptive_max_pool3d": lambda t: F.adaptive_max_pool3d(t, (2, 5, 1), True),
}
ROWS = {
    "cdist": lambda t: torch.cdist(t, t[:, :3] * 1.5),
    "cdist, p = 1": lambda t: torch.cdist(t, t[:, :3] * 1.5, p=1.0),
    "nanmedian": lambda t: t.where(t > -1, torch.nan).nanmedian(-1)[0],
    "nanmedian, keepdim": lambda t: t.where(t > -1, torch.nan).nanmedian(1, keepdim=True),
    "mode": lambda t: (t * 2).round().mode(-1)[0],
    "mode, keepdim": lambda t: (t * 2).round().mode(1, keepdim=True)[0],
    "cross": lambda t: torch.linalg.cross(t[..., :3], t[..., 3:6]),
    "cross of columns": lambda t: torch.linalg.cross(t[:, :3], t[:, 3:6], dim=1),
    "scatter_add": lambda t: t.scatter_add(1, t.argmax(1, keepdim=True), t),
}
WEIGHT = x(5, 17, 17)
BILINEAR = {"bilinear": lambda t: F.bilinear(t, t.flip(-1), WEIGHT.to(t.dtype))}
EVERY = {**IMAGES, **MAXIMA, **ROWS, **BILINEAR}
ALL_ROWS = {
    "weight_norm": lambda t: torch._weight_norm(
        t.unflatten(1, [-1, 17]).flatten(0, 1), t[:, :13].reshape(-1, 1)
    ),
    "pdist": lambda t: F.pdist(t),
    "nanmedian of all": lambda t: t.where(t > -1, torch.nan).nanmedian(),
}


def sample(name, dtype, rows=6):
    shape = (rows, 4, 13, 17) if name in IMAGES | MAXIMA else (rows, 13, 17)
    return x(*shape, dtype=dtype)


def error(result, true):
    return (result.double() - true).pow(2).mean().sqrt().item()


NOT_IN_HALF = ("avg_pool3d", "local_response_norm", "cdist", "cdist, p = 1", "pdist")
CASES = [(name, torch.float32) for name in [*EVERY, *ALL_ROWS]]
CASES += [(name, torch.bfloat16) for name in [*EVERY, *ALL_ROWS] if name not in NOT_IN_HALF]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values(name, dtype):
    """As exact as PyTorch's, over eight batches."""
    function = (EVERY | ALL_ROWS)[name]
    t = sample(name, dtype, 48)
    if name in ALL_ROWS:
        t = t.flatten(1)
    ours, eager = (testing.outputs(result) for result in rewrite(function, t)[2:])
    true = testing.outputs(function(t.double()))
    for a, b, c in zip(ours, eager, true, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            assert error(a, c) <= error(b, c) * 1.01
        else:
            assert torch.equal(a, b)


def all_of(functions, t):
    return [testing.outputs(function(t)) for function in functions]


def check_rows(functions, t):
    """A row alone, and among others at any place, in graphs of any number of rows."""
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(all_of, functions), backend="batch_invariant")
    with torch.no_grad():
        alone = compiled(t[:1])
        for count, place in ((2, 1), (5, 0), (6, 5)):
            rows = torch.full_like(t[:count], torch.nan)
            rows[place] = t[0]
            among = compiled(rows)
            for a, b in zip(among, alone, strict=True):
                parts = [part[place : place + 1] for part in a]
                testing.assert_same_bits(parts, list(b), f"{place} of {count}")


FEW = {name: IMAGES[name] for name in ("avg_pool2d, padding not counted",)}
EACH = [
    pytest.param(IMAGES | MAXIMA, marks=pytest.mark.soak, id="images"),
    pytest.param(FEW, id="few images"),
    pytest.param(ROWS | BILINEAR, id="rows"),
]


@pytest.mark.parametrize("names", EACH)
def test_bits_of_a_row(names):
    check_rows(list(names.values()), sample(next(iter(names)), torch.float32))


def test_an_order_that_depends_on_the_batch_is_caught(monkeypatch):
    def planted(t, *args):
        windows = t.unfold(-1, 3, 2).unfold(-3, 3, 2).flatten(-2).unbind(-1)
        return pooling._add(windows[:: -1 if len(t) > 2 else 1]) / 9

    table = capture._Table(capture.decomposition_table())
    table[torch.ops.aten.avg_pool2d.default] = planted
    monkeypatch.setattr(capture, "decomposition_table", lambda: table)
    with pytest.raises(testing.InvarianceViolation):
        check_rows([IMAGES["avg_pool2d"]], sample("avg_pool2d", torch.float32))


def to(*, small=False, **how):
    """Arguments of F.interpolate for [.., 9, 11]."""
    return {"size": (2, 7) if small else (13, 7), "mode": "bicubic", **how}


INTERPOLATIONS = {
    "bicubic": to(),
    "bicubic, scale": to(size=None, scale_factor=1.7),
    "antialias": to(antialias=True, small=True),
    "antialias, linear": to(antialias=True, mode="bilinear"),
    "antialias, scale": to(antialias=True, size=None, scale_factor=0.45),
    "antialias, corners": to(antialias=True, mode="bilinear", align_corners=True),
}
if hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):  # since PyTorch 2.13
    INTERPOLATIONS["antialias, lanczos"] = to(antialias=True, mode="lanczos", small=True)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_places_of_an_interpolation_are_exact(name):
    """Its factors follow from sizes alone, whose errors would be larger than those of products."""
    t = x(3, 2, 9, 11)
    resized = functools.partial(F.interpolate, **INTERPOLATIONS[name])
    exact = resized(t.double())
    run = torch.compile(resized, backend="batch_invariant")
    ours, theirs = ((f(t).double() - exact).square().mean().sqrt() for f in (run, resized))
    assert ours <= 0.5 * theirs
    if "antialias" not in name:
        torch.testing.assert_close(run(t.double()), exact)
    varying = torch.compile(resized, backend="batch_invariant", dynamic=True)
    whole = run(t)
    torch._dynamo.reset()
    testing.assert_same_bits(varying(t), whole, "dynamic")
    testing.assert_same_bits(varying(t[1:]), whole[1:], "fewer images")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_an_image_of_bytes(mode):
    """PyTorch computes it in whole numbers, and shifts them."""
    image = (255 * torch.rand(3, 2, 9, 11)).to(torch.uint8)
    resized = functools.partial(F.interpolate, size=(13, 7), mode=mode)
    run = torch.compile(resized, backend="batch_invariant")
    found = run(image)
    assert (found.int() - resized(image).int()).abs().max() <= 1
    testing.assert_same_bits(run(image[1:2]), found[1:2], "one image")


@pytest.mark.parametrize("width", [11, 5])
def test_what_has_a_factor_of_0_may_be_infinite(width):
    image = x(1, 2, 9, 11)
    image[..., 6:] = torch.inf
    resized = functools.partial(F.interpolate, size=(4, width), mode="bilinear", antialias=True)
    run = torch.compile(resized, backend="batch_invariant")
    expected = resized(image)
    assert expected[..., : width // 2 - 1].isfinite().all()
    torch.testing.assert_close(run(image), expected)
