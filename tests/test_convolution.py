"""Convolutions: one order, whatever spells them, and wherever a window lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rewriting import count, rewrite, x

from bicompile import native, registry, testing
from bicompile.testing import InvarianceViolation, assert_same_bits

KERNEL = registry.load_all()["convolution"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ours = torch.ops.bicompile
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def conv(t, w, b=None, stride=1, padding=0, dilation=1, groups=1):
    """Our op with a number for all axes."""
    r = t.dim() - 2
    return ours.convolution(
        t, w, b, [stride] * r, [padding] * r, [dilation] * r, False, [0] * r, groups, False
    )


def transposed(t, w, stride, padding=0, extra=0, dilation=1):
    r = t.dim() - 2
    return ours.convolution(
        t, w, None, [stride] * r, [padding] * r, [dilation] * r, True, [extra] * r, 1, False
    )


# ------------------------------------------------------------------------------------ spellings


@each_dtype
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_a_convolution_is_unfold_and_product(dtype, channels):
    """Few terms and many, few rows and many: one chain, that of mm, and then the bias."""
    for rows in (1, 4, 5, 33):
        t, w = x(2, channels, 9, 8, dtype=dtype), x(rows, channels, 3, 3, dtype=dtype)
        b = x(rows, dtype=dtype)
        columns = F.unfold(t, 3, padding=1).mT.reshape(2 * 72, -1)
        wanted = ours.addmm(b, columns, w.reshape(rows, -1).t(), 1.0, 1.0, False)
        out = conv(t, w, b, padding=1)
        assert_same_bits(out.permute(0, 2, 3, 1).reshape(144, rows), wanted, f"{rows} rows")


def test_padding_is_a_padded_image():
    t, w = x(2, 3, 9, 8), x(5, 3, 3, 3)
    w[0, 0, 0, 0] = torch.inf  # meets zeros: as in the padded image
    assert_same_bits(conv(t, w, padding=2), conv(F.pad(t, (2, 2, 2, 2)), w), "padding")


@each_dtype
def test_a_kernel_of_one_is_a_product(dtype):
    t, w = x(2, 37, 5, 6, dtype=dtype), x(9, 37, 1, 1, dtype=dtype)
    wanted = ours.mm(t.permute(0, 2, 3, 1).reshape(60, 37), w.reshape(9, 37).t(), False)
    assert_same_bits(conv(t, w).permute(0, 2, 3, 1).reshape(60, 9), wanted, "1 x 1")


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_transposed_output_is_a_product_of_the_taps_it_meets(stride, dilation):
    t, w = x(2, 5, 6), x(5, 4, 7)
    out = transposed(t, w, stride, padding=1, extra=stride - 1, dilation=dilation)
    for place in range(out.shape[2]):
        met = [(place + 1 - tap * dilation, tap) for tap in range(7)]
        met = [(at // stride, tap) for at, tap in met if at % stride == 0]
        columns = [t[:, :, i] if 0 <= i < 6 else torch.zeros(2, 5) for i, _ in met]
        if not met:
            assert out[:, :, place].eq(0).all()
            continue
        left = torch.stack(columns, 2).reshape(2, -1)
        right = w[:, :, [tap for _, tap in met]].permute(0, 2, 1).reshape(-1, 4)
        assert_same_bits(out[:, :, place], ours.mm(left, right, False), f"output {place}")


@each_dtype
@pytest.mark.parametrize(
    ("image", "taps", "stride", "padding", "dilation"),
    [
        ((7, 9), (3, 3), 1, 1, 1),
        ((130, 70), (3, 5), 2, 2, 1),  # bands of lines
        ((6000,), (4,), 1, 3, 1),  # bands of places
        ((40,), (31,), 1, 15, 1),  # more padding than some bands are long
        ((9, 20), (7, 7), 3, 9, 2),
        ((5, 6, 7), (3, 2, 1), 1, 1, 1),
    ],
)
def test_a_depthwise_convolution_is_one_of_each_channel(
    dtype, image, taps, stride, padding, dilation
):
    """Sixteen channels a vector, some channels, or one: no bit changes, nor by memory format."""
    t, w, b = x(2, 19, *image, dtype=dtype), x(19, 1, *taps, dtype=dtype), x(19, dtype=dtype)
    t.view(-1)[3::401] = torch.inf
    how = stride, padding, dilation
    single = [conv(t[:, i : i + 1], w[i : i + 1], b[i : i + 1], *how) for i in range(19)]
    wanted = torch.cat(single, 1)
    assert_same_bits(conv(t, w, b, *how, 19), wanted, "19 channels")
    last = t.movedim(1, -1).contiguous().movedim(-1, 1)
    assert_same_bits(conv(last, w, b, *how, 19), wanted, "channels last")
    assert_same_bits(conv(last[:, :9], w[:9], b[:9], *how, 9), wanted[:, :9], "9 channels")
    many = w[:5].repeat(1, 19, *[1] * len(taps))
    assert_same_bits(conv(last, many, None, *how), conv(t, many, None, *how), "one group")


def test_modules_become_one_node_each():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding="valid"),
        nn.Conv2d(8, 8, (4, 3), padding="same", groups=8, bias=False),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1),
        nn.Flatten(2),
        nn.Conv1d(4, 5, 7, dilation=3, padding=4),
        nn.Unflatten(2, (2, 43, 5)),
        nn.Conv3d(5, 3, 2),
    ).eval()
    gm, _, result, expected = rewrite(net, x(2, 3, 21, 19))
    assert count(gm, KERNEL.op) == 6
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_formats_change_no_bit(dtype):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))
    t = x(2, 3, 9, 8, dtype=dtype)
    compiled = torch.compile(net.to(dtype).eval(), backend="batch_invariant")
    with torch.no_grad():
        plain = compiled(t)
        net.to(memory_format=torch.channels_last)
        assert_same_bits(compiled(t.to(memory_format=torch.channels_last)), plain, "channels last")
        assert_same_bits(compiled(t[:1]), plain[:1], "one image")


# ------------------------------------------------------------------------------------- canaries


def honest(input, weight, bias, *how):
    return ours.convolution(input, weight, bias, *how)


def skips_taps_in_the_padding(input, weight, bias, *how):
    """Without a border, terms are numbered anew at the edge of the image."""
    whole = honest(input, weight, bias, *how)
    w = weight[:, :, 1:]
    inner = honest(input[:, :, : w.shape[2]], w, bias, *how)
    return torch.cat([inner[:, :, :1], whole[:, :, 1:]], 2) if how[1][0] else whole


def pads_with_the_nearest_element(input, weight, bias, stride, padding, *how):
    edges = [p for p in reversed(padding) for _ in (0, 1)]
    padded = F.pad(input, edges, mode="replicate")
    return honest(padded, weight, bias, stride, [0] * len(padding), *how)


def multiplies_what_it_does_not_need(input, weight, bias, *how):
    return honest(input, weight, bias, *how) + 0 * input.sum()


def order_follows_the_size_of_the_image(input, weight, bias, *how):
    if input.shape[2] % 2:
        return honest(input, weight, bias, *how)
    left, right = (honest(t, w, bias, *how) for t, w in _halves(input, weight, how[-2]))
    return left + right if bias is None else left + right - bias.view(-1, *[1] * len(how[0]))


def _halves(input, weight, groups):
    zeroed = weight.clone()
    zeroed[:, : weight.shape[1] // 2] = 0
    return (input, weight - zeroed), (input, zeroed)


CANARIES = (
    skips_taps_in_the_padding,
    pads_with_the_nearest_element,
    multiplies_what_it_does_not_need,
    order_follows_the_size_of_the_image,
)


def caught(variant):
    """Whether a law of windows sees it."""
    sizes = {"B": 2, "H": 1, "N": 5, "C": 8, "I1": 11, "I2": 9, "W1": 3, "W2": 3}
    for law in testing.kernels.OF_WINDOWS:
        sample = testing.make_sample(KERNEL, KERNEL.contract.cases[0], torch.float32, sizes)
        for seed in range(3):
            try:
                law(variant, sample, seed=seed)
            except InvarianceViolation:
                return True
    return False


@pytest.mark.parametrize("variant", CANARIES, ids=lambda v: v.__name__)
def test_planted_variants_are_caught(variant):
    assert caught(variant)


def test_an_honest_one_passes():
    assert not caught(honest)


def test_numbers_that_may_vary_are_guarded():
    """Under dynamic=True a stride that is an argument is a symbol."""

    def function(t, w, stride, padding):
        return F.conv1d(t, w, stride=stride, padding=padding)

    compiled = torch.compile(function, backend="batch_invariant", dynamic=True)
    t, w = x(2, 3, 20), x(4, 3, 3)
    for stride, padding in ((2, 1), (3, 2)):
        torch.testing.assert_close(compiled(t, w, stride, padding), function(t, w, stride, padding))
