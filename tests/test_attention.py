"""Laws of attention: one number for every spelling, and a masked key is as good as absent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bicompile import native, registry, testing

SDPA = registry.load_all()["sdpa"].op
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


class Problem:
    """Causal self-attention of one sequence: query i sees the keys 0..i."""

    def __init__(self, dtype, device, length, heads=4, groups=2, size=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda h: torch.randn(1, h, length, size, generator=generator).to(device, dtype)  # noqa: E731
        self.q, self.k, self.v = draw(heads), draw(groups), draw(groups)
        self.length, self.scale, self.device, self.dtype = length, size**-0.5, device, dtype
        self.visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.expected = SDPA(self.q, self.k, self.v, None, True, self.scale)

    def run(self, q, k, v, mask, **options):
        return SDPA(q, k, v, mask, False, self.scale, **options)


lengths = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 129])


@each_device
@each_dtype
@given(length=lengths, seed=st.integers(0, 9))
def test_spellings_of_a_mask_agree(device, dtype, length, seed):
    p = Problem(dtype, device, length, seed=seed)
    additive = torch.zeros(length, length, dtype=dtype, device=device)
    infinite = additive.masked_fill(~p.visible, -torch.inf)
    lowest = additive.masked_fill(~p.visible, torch.finfo(dtype).min)
    numbers = torch.arange(1, length + 1, dtype=torch.int32, device=device) * p.visible
    masks = {"bool": p.visible, "-inf": infinite, "finfo.min": lowest, "numbers": numbers}
    for name, mask in masks.items():
        for shape in ((length, length), (1, 1, length, length), (1, 4, length, length)):
            out = p.run(p.q, p.k, p.v, mask.expand(shape))
            testing.assert_same_bits(out, p.expected, f"{name} mask of shape {shape}")


@each_device
@each_dtype
@given(length=lengths)
def test_repeated_keys_are_grouped_keys(device, dtype, length):
    p = Problem(dtype, device, length)
    k, v = (t.repeat_interleave(2, 1) for t in (p.k, p.v))
    testing.assert_same_bits(SDPA(p.q, k, v, None, True, p.scale), p.expected, "repeated")


@each_device
@each_dtype
@given(length=lengths, seed=st.integers(0, 9), data=st.data())
def test_chunks_and_single_queries_are_the_whole(device, dtype, length, seed, data):
    p = Problem(dtype, device, length, seed=seed)
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    q, mask = p.q[:, :, start:end], p.visible[start:end]
    expected = p.expected[:, :, start:end]
    testing.assert_same_bits(p.run(q, p.k, p.v, mask), expected, "chunk, all keys")
    k, v = p.k[:, :, :end], p.v[:, :, :end]
    testing.assert_same_bits(p.run(q, k, v, mask[:, :end]), expected, "chunk, keys so far")
    last = p.run(p.q[:, :, end - 1 : end], k, v, None)
    testing.assert_same_bits(last, p.expected[:, :, end - 1 : end], "decode")


@each_device
@each_dtype
@pytest.mark.parametrize("junk", [0.0, 5.0, math.nan, math.inf])
@given(length=lengths, seed=st.integers(0, 9), data=st.data())
def test_masked_keys_are_absent(device, dtype, junk, length, seed, data):
    """Before the visible keys (left padding) and behind them (right padding, empty cache slots)."""
    p = Problem(dtype, device, length, seed=seed)
    sizes = st.sampled_from([0, 1, 3, 16, 33, 64, 100])
    before, after = data.draw(sizes), data.draw(sizes)

    def widen(t, value):
        shape = list(t.shape)
        shape[2] = before + length + after
        out = torch.full(shape, value, dtype=t.dtype, device=t.device)
        out[:, :, before : before + length] = t
        return out

    mask = torch.zeros(length, before + length + after, dtype=torch.bool, device=device)
    mask[:, before : before + length] = p.visible
    out = p.run(p.q, widen(p.k, junk), widen(p.v, junk), mask)
    testing.assert_same_bits(out, p.expected, f"{before} keys before and {after} behind")
    padded = torch.zeros(before + length, mask.shape[1], dtype=torch.bool, device=device)
    padded[before:] = mask
    q = torch.cat([torch.full_like(p.q[:, :, :1], junk).expand(-1, -1, before, -1), p.q], 2)
    out = p.run(q, widen(p.k, junk), widen(p.v, junk), padded)
    testing.assert_same_bits(out[:, :, before:], p.expected, f"{before} rows of padding")
    assert bool((testing.bits(out[:, :, :before]) == 0).all()), "a row that sees no key is 0"


@each_dtype
def test_holes_in_the_mask(dtype):
    """On the CPU a masked key between visible ones is absent too (a GPU counts it)."""
    p = Problem(dtype, "cpu", 65)
    keep = torch.arange(65) % 3 != 1
    out = p.run(p.q, p.k, p.v, p.visible & keep)
    without = p.run(p.q, p.k[:, :, keep], p.v[:, :, keep], p.visible[:, keep])
    testing.assert_same_bits(out, without, "holes")


@each_device
@each_dtype
@given(length=lengths, seed=st.integers(0, 9), data=st.data())
def test_caps_and_sinks(device, dtype, length, seed, data):
    """They keep the laws: padding, chunks; and a sink of -inf or a huge cap is none."""
    p = Problem(dtype, device, length, seed=seed)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(seed)).to(device)
    cap = data.draw(st.sampled_from([0.0, 0.5, 5.0]))
    whole = SDPA(p.q, p.k, p.v, None, True, p.scale, cap, sinks)
    start = data.draw(st.integers(0, length - 1))
    before = data.draw(st.sampled_from([0, 1, 16, 33]))
    k, v = (torch.nn.functional.pad(t, (0, 0, before, 5), value=math.nan) for t in (p.k, p.v))
    mask = torch.nn.functional.pad(p.visible[start:], (before, 5))
    out = p.run(p.q[:, :, start:], k, v, mask, softcap=cap, sinks=sinks)
    testing.assert_same_bits(out, whole[:, :, start:], f"from {start} on, {before} keys before")
    none = p.run(p.q, p.k, p.v, p.visible, sinks=torch.full_like(sinks, -torch.inf))
    testing.assert_same_bits(none, p.expected, "sinks of no weight")
    blind = p.run(p.q, p.k, p.v, torch.zeros_like(p.visible), softcap=cap, sinks=sinks)
    assert bool((testing.bits(blind) == 0).all()), "a row that sees its sink alone is 0"


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@given(data=st.data())
def test_a_window_that_rolls_is_the_whole(device, dtype, data):
    """Numbers in the mask say where the keys of a rolling cache stand in their row."""
    length, window = data.draw(st.sampled_from([(65, 16), (129, 100), (200, 64)]))
    p = Problem(dtype, device, length)
    key = torch.arange(length, device=device)
    seen = p.visible & (key > key[:, None] - window)
    numbers = torch.where(seen, key + 1, 0).int()
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    first = max(start - window + 1, 0)
    q, k, v = p.q[:, :, start:end], p.k[:, :, first:end], p.v[:, :, first:end]
    wholes = [p.run(p.q, p.k, p.v, mask) for mask in (numbers, seen)]
    for mask, whole in zip((numbers, seen), wholes, strict=True):
        out = p.run(q, k, v, mask[start:end, first:end])
        testing.assert_same_bits(out, whole[:, :, start:end], f"queries {start} to {end}")
    if device == "cpu":  # a GPU counts a window's keys from its first, or by their numbers
        testing.assert_same_bits(*wholes, "numbers or none")


@each_device
@each_dtype
def test_each_head_has_its_mask(device, dtype):
    """Also where several heads share their keys."""
    p = Problem(dtype, device, 33)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(1, 4, 33, 33, generator=generator) < 0.7).to(device)
    whole = p.run(p.q, p.k, p.v, mask)
    for head in range(4):
        one, of = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        alone = p.run(p.q[:, one], p.k[:, of], p.v[:, of], mask[:, one])
        testing.assert_same_bits(alone, whole[:, one], f"head {head} alone")


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_long_windows_do_not_see_each_other(device, dtype):
    """Rows that begin at different keys, and see more of them than any block or chunk has."""
    length, window = 1300, 700
    p = Problem(dtype, device, length, heads=2, groups=1)
    key = torch.arange(length, device=device)
    queries = torch.tensor([699, 760, 1023, 1299], device=device)
    last = queries[:, None]
    numbers = torch.where((key <= last) & (key > last - window), key + 1, 0).int()
    q = p.q[:, :, queries]
    whole = p.run(q, p.k, p.v, numbers)
    for i, end in enumerate(queries.tolist()):
        alone = p.run(q[:, :, i : i + 1], p.k, p.v, numbers[i : i + 1])
        testing.assert_same_bits(alone, whole[:, :, i : i + 1], f"query {end} alone")
        seen = slice(end - window + 1, end + 1)
        cut = p.run(q[:, :, i : i + 1], p.k[:, :, seen], p.v[:, :, seen], numbers[i : i + 1, seen])
        testing.assert_same_bits(cut, whole[:, :, i : i + 1], f"query {end} and its keys alone")


@each_device
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 24), (torch.float32, 80)])
def test_value_size_may_differ(device, dtype, size):
    q, k = torch.randn(2, 4, 5, size), torch.randn(2, 2, 9, size)
    v = torch.randn(2, 2, 9, 40)
    reference = registry.KERNELS["sdpa"].reference
    true = reference(*(t.to(dtype).double() for t in (q, k, v)), None, False, 0.2)
    q, k, v = (t.to(device, dtype) for t in (q, k, v))
    out = SDPA(q, k, v, None, False, 0.2)
    assert out.shape == (2, 4, 5, 40)
    assert (out.cpu() - true).abs().max() < 100 * torch.finfo(dtype).eps


@each_device
def test_a_seen_nan_is_a_nan(device):
    p = Problem(torch.bfloat16, device, 20)
    v = p.v.clone()
    v[:, :, 7] = torch.nan
    out = SDPA(p.q, p.k, v, None, True, p.scale)
    assert bool(out[:, :, 7:].isnan().all())
    testing.assert_same_bits(out[:, :, :7], p.expected[:, :, :7], "rows before the NaN")
