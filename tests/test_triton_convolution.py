"""The laws of the Triton kernel of convolutions."""

import pytest
import torch
from triton_set_up import (
    DEVICE,
    DTYPES,
    FULL,
    INF,
    INTERPRET,
    NAN,
    law,
    no_worse,
    randn,
    same,
    views,
)

from bicompile.kernels.convolution import gpu
from bicompile.kernels.convolution.schedules import schedules
from bicompile.kernels.matmul import gpu as matmul

# Sizes of the input, of the weight, then stride, padding, dilation, transposed, groups.
FORMS = {
    "two axes": ((3, 16, 5, 7), (5, 16, 3, 3), [1, 1], [1, 1], [1, 1], False, 1),
    "few terms": ((3, 6, 5, 7), (9, 2, 3, 3), [2, 1], [1, 2], [1, 2], False, 3),
    "depthwise": ((3, 6, 20), (6, 1, 4), [1], [3], [1], False, 6),
    "grouped": ((3, 68, 11), (6, 34, 3), [2], [2], [2], False, 2),
    "padded by one tap": ((2, 8, 3, 4), (3, 8, 1, 1), [2, 1], [1, 2], [1, 1], False, 1),
    "one channel, many taps": ((2, 1, 12, 9), (3, 1, 9, 8), [1, 1], [1, 1], [1, 1], False, 1),
    "a thin image": ((2, 5, 6, 1), (3, 5, 3, 1), [1, 1], [1, 0], [1, 1], False, 1),
    "three axes": ((2, 9, 4, 3, 4), (3, 9, 2, 2, 3), [1, 2, 1], [0, 1, 1], [1, 1, 2], False, 1),
    "transposed": ((3, 70, 6), (70, 4, 5), [2], [1], [1], True, 1),
    "transposed, dilated": ((3, 8, 5, 4), (8, 3, 3, 3), [3, 1], [1, 0], [2, 1], True, 2),
}


def call(x, w, b, stride, padding, dilation, transposed, groups, tf32=False):
    return gpu.convolution(
        x, w, b, stride, padding, dilation, transposed, [0] * len(stride), groups, tf32
    )


def true(x, w, b, stride, padding, dilation, transposed, groups):
    x, w, b = (t.double().cpu() for t in (x, w, b))
    return torch.convolution(
        x, w, b, stride, padding, dilation, transposed, [0] * len(stride), groups
    )


@law
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_windows(form, dtype):
    shape, weights, *how = FORMS[form]
    x, w = randn(*shape, dtype=dtype), randn(*weights, dtype=dtype, seed=1)
    b = randn((weights[1] if how[3] else weights[0] // how[4]) * how[4], dtype=dtype, seed=2)
    whole = call(x, w, b, *how)
    wanted = true(x, w, b, *how)
    theirs = torch.convolution(x, w, b, *how[:4], [0] * len(how[0]), how[4])
    assert whole.shape == theirs.shape
    no_worse(whole, theirs, wanted)
    same(call(x[1:2], w, b, *how), whole[1:2])
    for view, weight in zip(views(x), views(w), strict=True):
        same(call(view, weight, b, *how), whole)
    x[0], x[2:] = NAN, INF
    same(call(x, w, b, *how)[1], whole[1])


@law
def test_a_place_in_the_image_changes_nothing():
    for name in ("two axes", "few terms", "transposed"):
        shape, weights, *how = FORMS[name]
        x, w = randn(*shape), randn(*weights, seed=1)
        alone = call(x, w, None, *how)
        framed = torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], -1)
        steps = shape[-1] * how[0][-1] if how[3] else shape[-1] // how[0][-1]
        part = call(framed, w, None, *how)[..., steps : steps + alone.shape[-1]]
        same(part.contiguous(), alone)


@law
def test_a_group_and_a_channel_change_nothing():
    for name, channels in (("grouped", 34), ("few terms", 2)):
        shape, weights, *how = FORMS[name]
        x, w = randn(*shape), randn(*weights, seed=1)
        whole, rows = call(x, w, None, *how), weights[0] // how[4]
        own = call(x[:, channels : 2 * channels], w[rows : 2 * rows], None, *how[:4], 1)
        same(own, whole[:, rows : 2 * rows].contiguous())
        one = call(x[:, channels : 2 * channels], w[rows : rows + 1], None, *how[:4], 1)
        same(one, whole[:, rows : rows + 1].contiguous())


def columns_of(x, w, filled):
    """The windows of x [B * P, K] and the weight [K, N] of `same` padding, channels innermost."""
    (n, c, *taps), sizes = w.shape, x.shape[2:]
    columns = torch.nn.functional.unfold(x.cpu().float(), taps, padding=taps[0] // 2).to(x)
    columns = columns.view(len(x), c, -1, sizes.numel()).permute(0, 3, 2, 1)
    rows = w.view(n, c, -1).mT
    columns, rows = (torch.nn.functional.pad(t, (0, filled - c)) for t in (columns, rows))
    return columns.reshape(len(x) * sizes.numel(), -1), rows.reshape(n, -1).t()


@law
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "filled"), [(3, 4), (12, 16), (64, 64)])
def test_a_convolution_is_unfold_and_product(dtype, channels, filled):
    x, w = randn(2, channels, 4, 5, dtype=dtype), randn(7, channels, 3, 3, dtype=dtype, seed=1)
    wanted = matmul.mm(*columns_of(x, w, filled), False)
    out = call(x, w, None, [1, 1], [1, 1], [1, 1], False, 1)
    same(out.permute(0, 2, 3, 1).reshape(-1, 7), wanted)


@law
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_terms_are_parts_in_rising_order(dtype, monkeypatch):
    """Whether a part is a program of its own, or one program has all, the bits are the same."""
    monkeypatch.setattr(gpu, "PART", 256)
    x, w = 100 * randn(2, 66, 3, 4, dtype=dtype), randn(20, 66, 3, 3, dtype=dtype, seed=1)
    b = randn(20, dtype=dtype, seed=2)
    columns, rows = columns_of(x, w, 72)  # 648 terms in parts of 256
    parts = [
        matmul.mm(columns[:, k : k + 256].float(), rows[k : k + 256].float(), dtype != FULL)
        for k in (0, 256, 512)
    ]
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False
    found = [gpu.convolution(x, w, b, *how, chosen=s) for s in schedules(kind_of(dtype))]
    assert len(found) >= 2
    for out in found[1:]:
        same(out, found[0])
    if INTERPRET or dtype is FULL:  # where the chain of a half is that of tf32
        wanted = (parts[0] + parts[1] + parts[2] + b.float()).to(dtype)
        same(found[0].permute(0, 2, 3, 1).reshape(-1, 20), wanted)
    same(gpu.convolution(x[1:], w, b, *how), found[0][1:])
    last = x.contiguous(memory_format=torch.channels_last)
    same(gpu.convolution(last, w, b, *how), found[0])


def kind_of(dtype):
    return "half" if dtype != FULL else "double"


@law
def test_memory_formats_change_no_bit():
    """Also of a few channels, of a part of them, and of each alone."""
    for c, n, groups in ((16, 6, 2), (6, 4, 1), (6, 6, 6), (6, 12, 6)):
        x, w = randn(2, c, 5, 6), randn(n, c // groups, 3, 3, seed=1)
        how = [1, 1], [1, 1], [1, 1], False, groups
        whole = call(x, w, None, *how)
        last = x.contiguous(memory_format=torch.channels_last)
        same(call(last, w.contiguous(memory_format=torch.channels_last), None, *how), whole)
        wide = torch.full((2, 9 + c, 5, 6), NAN, device=DEVICE)
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 5 : 5 + c] = x
        same(call(wide[:, 5 : 5 + c], w, None, *how), whole)


@law
def test_one_tap_is_a_product():
    """However many terms it has."""
    for c in (20, 1600):
        x, w = randn(2, c, 3, 2), randn(9, c, 1, 1, seed=1)
        wanted = matmul.mm(x.permute(0, 2, 3, 1).reshape(12, c), w.view(9, c).t(), False)
        out = call(x, w, None, [1, 1], [0, 0], [1, 1], False, 1)
        same(out.permute(0, 2, 3, 1).reshape(12, 9), wanted)


@law
@pytest.mark.skipif(INTERPRET, reason="the interpreter's dot is a stand-in")
def test_tf32():
    shape, weights, *how = FORMS["two axes"]
    x, w = randn(*shape), randn(*weights, seed=1)
    same(call(x[1:2], w, None, *how, tf32=True), call(x, w, None, *how, tf32=True)[1:2])
    assert call(x, w, None, *how, tf32=True).dtype is FULL
