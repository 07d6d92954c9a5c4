"""Gradients of convolutions: those of an image by its row, those of weights in a pinned order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rewriting import count, traced, x

from bicompile import native, testing

aten = torch.ops.aten
ours = torch.ops.bicompile


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


@dataclass(frozen=True)
class Case:
    """A convolution: the sizes of an image and of the weight, and how the one meets the other."""

    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    transposed: bool = False
    extra: tuple[int, ...] = (0,)
    groups: int = 1
    wanted: tuple[bool, ...] = (True, True, True)

    def how(self):
        rank = len(self.image) - 1
        each = lambda n: list(n) * (rank // len(n))  # noqa: E731
        numbers = [each(n) for n in (self.stride, self.padding, self.dilation)]
        return *numbers, self.transposed, each(self.extra), self.groups

    def problem(self, rows, dtype=torch.float32, seed=0):
        """The gradient of the result, images and the weight."""
        t, w = (torch.empty(s, device="meta") for s in ((rows, *self.image), self.weight))
        out = torch.convolution(t, w, None, *self.how())
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(v.shape, generator=generator).to(dtype) for v in (out, t, w)]

    def eager(self, g, t, w):
        found = aten.convolution_backward(g, t, w, [g.shape[1]], *self.how(), list(self.wanted))
        return tuple(f for f, wanted in zip(found, self.wanted, strict=True) if wanted)

    def compiled(self, g, t, w):
        return traced(self.eager, g, t, w)(g, t, w)


CASES = {
    "1d": Case((4, 12), (24, 2, 3), (2,), (2,), (2,), groups=2),
    "2d": Case((3, 10, 7), (12, 3, 3, 2), (2, 1), (1,)),
    "2d, long strides": Case((3, 12, 9), (12, 3, 2, 2), (3, 4), (1,)),
    "a kernel of one": Case((20, 6, 5), (12, 20, 1, 1), wanted=(True, True, False)),
    "depthwise": Case((4, 8, 9), (4, 1, 5, 5), (1,), (2,), groups=4),
    "3d": Case((2, 5, 6, 4), (12, 2, 2, 2, 2), (3,), (1,)),
    "transposed": Case((4, 5, 4), (4, 3, 3, 3), (2,), (1,), (1,), True, (1,), 2),
    "transposed past a stride": Case((3, 6), (3, 4, 3), (2,), (0,), (3,), True, (2,)),
}
"""Sums of eight terms or more: with fewer, the order of `mm` rounds each product by itself."""
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# ------------------------------------------------------------------------------------- the laws


def check_rows(case, gradients):
    """What goes back to an image is the same among NaN, at any place, in a batch of any size."""
    g, t, w = case.problem(5)
    whole = gradients(g, t, w)[0]
    for rows in ([0], [4, 1, 2]):
        testing.assert_same_bits(gradients(g[rows], t[rows], w)[0], whole[rows], f"rows {rows}")
    others = torch.tensor([0, 1, 3, 4])
    g, t = g.index_fill(0, others, torch.nan), t.index_fill(0, others, torch.nan)
    testing.assert_same_bits(gradients(g, t, w)[0][2], whole[2], "among NaN")


def check_runs(case, gradients):
    """Every gradient, with other numbers of threads and in another layout."""
    g, t, w = case.problem(7)
    expected = gradients(g, t, w)
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            testing.assert_same_bits(gradients(g, t, w), expected, f"{threads} threads")
    g, t = (v.transpose(1, -1).contiguous().transpose(1, -1) for v in (g, t))
    testing.assert_same_bits(gradients(g, t, w), expected, "channels last")


def check_weight(case, gradients):
    """A weight's gradient is a sum of products over 256 terms, of images, then of positions."""
    g, t, w = case.problem(10)
    stride, padding, dilation, _, _, groups = case.how()
    columns = F.unfold(t, w.shape[2:], dilation, padding, stride)  # [B, G * C * W, P]
    columns, rows = (
        v.unflatten(1, [groups, -1]).permute(1, 2, 0, 3).flatten(2) for v in (columns, g.flatten(2))
    )
    wanted = []
    for r, c in zip(rows, columns, strict=True):
        parts = zip(r.split(256, 1), c.split(256, 1), strict=True)
        products = torch.stack([ours.mm(a, b.t(), False) for a, b in parts])
        wanted.append(ours.sum(products, [0], False, torch.float32))
    testing.assert_same_bits(gradients(g, t, w)[1], torch.cat(wanted).view_as(w), "by parts")


WITH_UNFOLD = [c for c in CASES.values() if len(c.image) == 3 and not c.transposed]


@each_case
def test_laws(case):
    dynamic = traced(case.eager, *case.problem(50), tracing_mode="symbolic")
    for gradients in (case.compiled, dynamic):
        check_rows(case, gradients)
        check_runs(case, gradients)
        if case in WITH_UNFOLD:
            check_weight(case, gradients)
    problem = case.problem(40)
    testing.assert_same_bits(dynamic(*problem), case.compiled(*problem), "dynamic shapes")


def adds_up_images(case):
    def gradients(g, t, w):
        found = [case.compiled(g[i : i + 1], t[i : i + 1], w) for i in range(len(g))]
        image, *sums = zip(*found, strict=True)
        return torch.cat(image), *(torch.stack(s).sum(0) for s in sums)

    return gradients


def adds_up_parts_of_threads(case):
    def gradients(g, t, w):
        found = [
            case.compiled(*part, w)
            for part in zip(*(v.chunk(torch.get_num_threads()) for v in (g, t)), strict=True)
        ]
        image, *sums = zip(*found, strict=True)
        return torch.cat(image), *(torch.stack(s).sum(0) for s in sums)

    return gradients


def image_by_halves_of_channels_in_a_large_batch(case):
    def gradients(g, t, w):
        found = case.compiled(g, t, w)
        if len(g) < 4:
            return found
        halves = [case.compiled(g[:, c], t, w[c])[0] for c in (slice(2), slice(2, None))]
        return halves[0] + halves[1], *found[1:]

    return gradients


def multiplies_what_it_does_not_need(case):
    def gradients(g, t, w):
        image, *sums = case.compiled(g, t, w)
        return image + 0 * g.sum(), *sums

    return gradients


VARIANTS = {
    adds_up_images: check_weight,
    adds_up_parts_of_threads: check_runs,
    image_by_halves_of_channels_in_a_large_batch: check_rows,
    multiplies_what_it_does_not_need: check_rows,
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.__name__)
def test_planted_variants_are_caught(variant):
    case = CASES["2d"]
    with pytest.raises(testing.InvarianceViolation):
        VARIANTS[variant](case, variant(case))


# ------------------------------------------------------------------------------------ the values


def error(found, true):
    return (found.double() - true).square().mean().sqrt().item()


def check_errors(case, dtype, gradients):
    """As exact as PyTorch's, or as the true values rounded: the mean over four batches."""
    errors = []
    for seed in range(4):
        g, t, w = case.problem(48, dtype, seed)
        true = case.eager(g.double(), t.double(), w.double())
        for a, b, c in zip(gradients(g, t, w), case.eager(g, t, w), true, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            errors.append([error(v, c) for v in (a, b, c.to(dtype))])
    ours, eager, rounding = torch.tensor(errors).view(4, -1, 3).mean(0).unbind(-1)
    assert (ours <= 1.02 * eager.maximum(rounding)).all(), (ours, eager, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_errors_are_no_worse_than_pytorchs(case, dtype):
    check_errors(case, dtype, case.compiled)


def test_a_larger_error_is_caught():
    case = CASES["2d"]
    with pytest.raises(AssertionError):
        check_errors(case, torch.float32, lambda *p: [f * (1 + 1e-6) for f in case.compiled(*p)])


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1])
def test_only_what_is_wanted_is_computed(wanted):
    for name in ("2d", "transposed"):
        case = replace(CASES[name], wanted=wanted)
        problem = case.problem(3)
        gm = traced(case.eager, *problem)
        torch.testing.assert_close(gm(*problem), case.eager(*problem))
        for op, index in ((ours.convolution, 0), (ours.bmm, 1), (ours.sum, 2)):
            assert count(gm, op.default) == wanted[index]


@each_case
def test_no_images(case):
    g, t, w = case.problem(0)
    image, *sums = case.compiled(g, t, w)
    assert image.shape == t.shape
    assert sums[0].shape == w.shape and not any(s.any() for s in sums)


@pytest.mark.soak
def test_modules():
    """Forward and backward by Inductor, for any number of images."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, bias=False),
    )
    compiled = torch.compile(net, backend="batch_invariant", dynamic=True)
    images = x(5, 3, 9, 8)

    def gradients(function, rows):
        net.zero_grad()
        t = images[:rows].clone().requires_grad_()
        function(t).square().sum().backward()
        return [t.grad, *(p.grad.clone() for p in net.parameters())]

    found = gradients(compiled, 5)
    torch.testing.assert_close(found, gradients(net, 5))
    few = gradients(compiled, 3)
    testing.assert_same_bits(found[0][:3], few[0], "the gradient of a row")
