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
from bicompile.kernels.matmul import gpu as matmul

# Sizes of the input, of the weight, then stride, padding, dilation, transposed, groups.
FORMS = {
    "two axes": ((3, 16, 5, 7), (5, 16, 3, 3), [1, 1], [1, 1], [1, 1], False, 1),
    "few terms": ((3, 6, 5, 7), (9, 2, 3, 3), [2, 1], [1, 2], [1, 2], False, 3),
    "depthwise": ((3, 6, 20), (6, 1, 4), [1], [3], [1], False, 6),
    "grouped": ((3, 68, 11), (6, 34, 3), [2], [2], [2], False, 2),
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


@law
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_is_unfold_and_product(dtype):
    x, w = randn(2, 12, 6, 5, dtype=dtype), randn(7, 12, 3, 3, dtype=dtype, seed=1)
    columns = torch.nn.functional.unfold(x.cpu().float(), 3, padding=1).to(DEVICE, dtype)
    wanted = matmul.mm(columns.mT.reshape(-1, 108).contiguous(), w.reshape(7, 108).t(), False)
    out = call(x, w, None, [1, 1], [1, 1], [1, 1], False, 1)
    same(out.permute(0, 2, 3, 1).reshape(-1, 7), wanted)


@law
@pytest.mark.skipif(INTERPRET, reason="the interpreter's dot is a stand-in")
def test_tf32():
    shape, weights, *how = FORMS["two axes"]
    x, w = randn(*shape), randn(*weights, seed=1)
    same(call(x[1:2], w, None, *how, tf32=True), call(x, w, None, *how, tf32=True)[1:2])
    assert call(x, w, None, *how, tf32=True).dtype is FULL
