"""The laws of the Triton kernels of attention."""

import pytest
import torch
from triton_set_up import (
    DEVICE,
    DTYPES,
    FULL,
    HALF,
    INF,
    INTERPRET,
    NAN,
    bits,
    law,
    no_worse,
    randn,
    real_dot,
    same,
    views,
)

from bicompile import registry
from bicompile.kernels.attention import gpu as attention
from bicompile.kernels.attention import gradients
from bicompile.kernels.attention import schedules as attention_schedules
from bicompile.kernels.attention import table as attention_table
from bicompile.kernels.attention.op import sdpa_reference
from bicompile.kernels.attention_backward import gpu as attention_backward
from bicompile.kernels.common.launch import capability

LONG = 60 if INTERPRET else 1300
if INTERPRET:
    attention.CHUNK, attention.TILE, attention.MERGE_ROWS = 32, {2: 16, 4: 16}, 128
    attention_backward.TILES = [(attention_backward.Tiles(16, 16, 4, 1),) * 2] * 3
    gradients.TILES = {4: (16, 16)}


def _qkv(b, h, hkv, q, s, d, dv, dtype):
    return (
        randn(b, h, q, d, dtype=dtype),
        randn(b, hkv, s, d, dtype=dtype, seed=1),
        randn(b, hkv, s, dv, dtype=dtype, seed=2),
    )


def sdpa(q, k, v, mask=None, causal=False, dtype=FULL, **options):
    """In fp32, before the one rounding: halves would hide most differences."""
    scale = q.shape[-1] ** -0.5
    return attention.sdpa(q, k, v, mask, causal, scale, dtype=dtype, **options)


def _causal(q, s, past=0):
    return torch.ones(q, s, dtype=torch.bool, device=DEVICE).tril(past)


HEADS = ((3, 1, 24, 40),) if INTERPRET else (
    (8, 2, 64, 64), (9, 3, 64, 64), (8, 8, 128, 128), (4, 1, 80, 96), (2, 2, 256, 256),
)  # fmt: skip
HEAD_SIZES = {40: 64, 64: 64, 96: 128, 128: 128, 256: 256}  # head -> column of the table
SOME = {HALF: HEADS, torch.float16: HEADS[:1], FULL: () if INTERPRET else HEADS[:1] + HEADS[2:4]}
attention_case = pytest.mark.parametrize(
    "dtype,h,hkv,d,dv", [(dtype, *heads) for dtype in DTYPES for heads in SOME[dtype]]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
# The interpreter is slow: one of them there.
one_dtype = pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRET else DTYPES)


def _schedules(q, head):
    """Every schedule of this device; the interpreter runs those of the newest."""
    at = attention_schedules.key(q.element_size(), head)
    return attention_table.schedules(at, capability(q.device))


@law
@attention_case
def test_attention_spellings_and_schedules(dtype, h, hkv, d, dv):
    n = LONG // 2
    q, k, v = _qkv(2, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    assert whole.transpose(1, 2).is_contiguous()
    mask = _causal(n, n)
    same(sdpa(q, k, v, mask), whole)
    same(sdpa(q, k, v, mask.expand(2, h, n, n).contiguous()), whole)
    same(sdpa(q, k, v, torch.zeros(n, n, device=DEVICE).masked_fill(~mask, -INF)), whole)
    g = h // hkv
    same(sdpa(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), causal=True), whole)
    same(sdpa(q[1:], k[1:], v[1:], causal=True), whole[1:])
    for s in _schedules(q, HEAD_SIZES[max(d, dv)]):
        for split in (False, True):
            same(sdpa(q, k, v, causal=True, chosen=s, split=split), whole)
            same(sdpa(q, k, v, mask, chosen=s, split=split), whole)
    for a, b, c in zip(views(q), views(k), views(v), strict=True):
        same(sdpa(a, b, c, causal=True), whole)
        same(sdpa(a, b, c, mask), whole)


@law
@attention_case
def test_attention_prefill_chunks_and_decode(dtype, h, hkv, d, dv):
    n = LONG
    q, k, v = _qkv(1, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    for past, count in ((n - 1, 1), (n // 2 + 3, 1), (n // 3, 5), (n // 4 + 1, n // 2)):
        part, end = q[:, :, past : past + count], past + count
        want = whole[:, :, past : past + count]
        mask = _causal(count, end, past)
        same(sdpa(part, k[:, :, :end], v[:, :, :end], mask), want)
        cache = torch.full((2, 1, hkv, n + 77, max(d, dv)), NAN, dtype=dtype, device=DEVICE)
        keys, values = cache[0, ..., :d], cache[1, ..., :dv]
        keys[:, :, :end], values[:, :, :end] = k[:, :, :end], v[:, :, :end]
        for split in (False, True):
            padded = torch.nn.functional.pad(mask, (0, n + 77 - end))
            same(sdpa(part, keys, values, padded, split=split), want)
        if count == 1:
            same(sdpa(part, k[:, :, :end], v[:, :, :end]), want)


@law
@attention_case
def test_masked_keys_are_absent(dtype, h, hkv, d, dv):
    n = 40 if INTERPRET else 600
    q, k, v = _qkv(2, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    for left in (1, 33) if INTERPRET else (1, 64, 130):

        def padded(x, fill, left=left):
            y = torch.full((2, hkv, left + n + 3, x.shape[-1]), fill, dtype=dtype, device=DEVICE)
            y[0, :, left : left + n], y[1, :, :n] = x[0], x[1]
            return y

        mask = torch.zeros(2, 1, n, left + n + 3, dtype=torch.bool, device=DEVICE)
        mask[0, 0, :, left : left + n], mask[1, 0, :, :n] = _causal(n, n), _causal(n, n)
        for fill in (NAN, INF):
            same(sdpa(q, padded(k, fill), padded(v, fill), mask), whole)
            some = slice(n - 2, n)
            got = sdpa(q[:, :, some], padded(k, fill), padded(v, fill), mask[:, :, some])
            same(got, whole[:, :, some])
    blind = mask.clone()
    blind[:, :, 5] = False
    seen = sdpa(q, padded(k, NAN), padded(v, NAN), blind)
    assert (seen[:, :, 5] == 0).all()
    same(seen[:, :, 6:], whole[:, :, 6:])


@law
@each_dtype
def test_a_row_that_sees_nothing_stands_beside_rows_that_see_all(dtype):
    n = LONG // 2
    q, k, v = _qkv(1, 2, 1, n, n, 32, 32, dtype)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=DEVICE)
    whole = sdpa(q, k, v)
    mask[:, :, n // 3] = False
    for split in (False, True):
        got = sdpa(q, k, v, mask, split=split)
        assert (got[:, :, n // 3] == 0).all()
        same(got[:, :, n // 3 + 1 :], whole[:, :, n // 3 + 1 :])
        same(got[:, :, : n // 3], whole[:, :, : n // 3])


@law
@each_dtype
def test_values_that_are_not_finite_reach_who_sees_them(dtype):
    n = 40 if INTERPRET else 200
    q, k, v = _qkv(1, 2, 1, n, n, 32, 32, dtype)
    whole, at = sdpa(q, k, v, causal=True), n - 7
    bad = v.clone()
    bad[:, :, at, 0], bad[:, :, at, 1], bad[:, :, at, 2] = NAN, INF, -INF
    bad[:, :, at + 1, 2] = INF
    got = sdpa(q, k, bad, causal=True)
    same(got[:, :, :at], whole[:, :, :at])
    same(got[..., 3:], whole[..., 3:])
    assert got[:, :, at:, 0].isnan().all() and got[:, :, at + 1 :, 2].isnan().all()
    assert (got[:, :, at:, 1] == INF).all() and (got[:, :, at, 2] == -INF).all()
    same(sdpa(q[:, :, at:], k, bad, _causal(n, n)[at:]), got[:, :, at:])
    same(sdpa(q[:, :, -1:], k, bad), got[:, :, -1:])


@law
@one_dtype
def test_attention_masks_of_any_form(dtype):
    b, h, n, s = 2, 4, 9, LONG // 2
    q, k, v = _qkv(b, h, 2, n, s, 32, 32, dtype)
    generator = torch.Generator().manual_seed(0)
    ragged = (torch.rand(b, 1, n, s, generator=generator) < 0.3).to(DEVICE)
    ragged[0, 0, 2], ragged[..., 3] = False, True
    ragged[0, 0, 2] = False
    whole = sdpa(q, k, v, ragged)
    same(sdpa(q, k, v, ragged, split=True), whole)
    bias = torch.zeros(b, 1, n, s, device=DEVICE).masked_fill(~ragged, -INF)
    same(sdpa(q, k, v, bias), whole)
    same(sdpa(q, k, v, bias.to(HALF)), whole)
    for i in range(b):
        same(sdpa(q[i : i + 1], k[i : i + 1], v[i : i + 1], ragged[i]), whole[i : i + 1])
    alibi = randn(1, h, 1, s)
    same(sdpa(q, k, v, alibi), sdpa(q, k, v, alibi.expand(b, h, n, s).contiguous()))
    per_key = ragged[:, :, :1]
    same(sdpa(q, k, v, per_key), sdpa(q, k, v, per_key.expand(b, h, n, s).contiguous()))
    for mask in (ragged, bias, alibi, per_key):
        exact = _exact(q, k, v, mask)
        torch.testing.assert_close(sdpa(q, k, v, mask).double().cpu(), exact, rtol=2e-2, atol=2e-2)
    assert (sdpa(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert sdpa(q[:, :, :0], k, v).shape == (b, h, 0, 32)
    same(attention.sdpa(q, k, v, None, False, -0.3), attention.sdpa(-q, k, v, None, False, 0.3))
    rounded = sdpa(q, k, v, ragged, dtype=None)
    assert rounded.dtype == dtype
    same(rounded, whole.to(dtype))


@law
@one_dtype
def test_caps_and_sinks(dtype):
    n = LONG // 2
    q, k, v = _qkv(2, 4, 2, n, n, 24, 40, dtype)
    sinks = randn(4, dtype=dtype)
    plain = sdpa(q, k, v, causal=True)
    for options in ({"sinks": sinks}, {"softcap": 0.5, "sinks": sinks}):
        whole = sdpa(q, k, v, causal=True, **options)
        assert (bits(whole) != bits(plain)).any()
        mask = torch.nn.functional.pad(_causal(n, n), (7, 3))
        a, b = (torch.nn.functional.pad(t, (0, 0, 7, 3), value=NAN) for t in (k, v))
        for split in (False, True):
            same(sdpa(q, k, v, causal=True, split=split, **options), whole)
            same(
                sdpa(q[1:, :, 5:], a[1:], b[1:], mask[5:], split=split, **options), whole[1:, :, 5:]
            )
        exact = sdpa_reference(
            *(t.double().cpu() for t in (q, k, v)), None, True, 24**-0.5,
            options.get("softcap", 0.0), sinks.cpu() if "sinks" in options else None,
        )  # fmt: skip
        torch.testing.assert_close(whole.double().cpu(), exact, rtol=2e-2, atol=2e-2)
    same(sdpa(q, k, v, causal=True, sinks=torch.full_like(sinks, -INF)), plain)
    assert (sdpa(q, k[:, :, :0], v[:, :, :0], sinks=sinks) == 0).all()


@law
@one_dtype
def test_a_window_that_rolls_is_the_whole(dtype):
    """Keys are counted from the first that a query sees, or where the numbers say."""
    n, window = (90, 40) if INTERPRET else (1300, 600)
    q, k, v = _qkv(1, 4, 2, n, n, 24, 40, dtype)
    key = torch.arange(n, device=DEVICE)
    seen = _causal(n, n) & (key > key[:, None] - window)
    numbers = torch.where(seen, key + 1, 0).int()
    whole = sdpa(q, k, v, numbers)
    same(whole[:, :, :window], sdpa(q, k, v, causal=True)[:, :, :window])
    assert (bits(sdpa(q, k, v, seen)) != bits(whole)).any(), "numbers take part: the test can fail"
    for mask in (numbers, seen):
        whole = sdpa(q, k, v, mask)
        for start, end in ((n - 26, n - 10), (n - 1, n))[: 1 if INTERPRET else None]:
            first = start - window + 1
            part = (q[:, :, start:end], k[:, :, first:end], v[:, :, first:end])
            for split in (False, True):
                got = sdpa(*part, mask[start:end, first:end], split=split)
                same(got, whole[:, :, start:end])


@law
@one_dtype
def test_rows_begin_anywhere(dtype):
    """Queries that see different first keys: packed sequences, and masks of any form."""
    n, cut = (35, 14) if INTERPRET else (700, 290)
    q, k, v = _qkv(1, 4, 2, n, n, 24, 40, dtype)
    packed = _causal(n, n)
    packed[cut:, :cut] = False
    random = (torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.1).to(DEVICE)
    alone = sdpa(*(t[:, :, cut:] for t in (q, k, v)), causal=True)
    same(sdpa(q, k, v, packed)[:, :, cut:], alone)
    for mask in (packed, random, torch.where(random, 0.5, -INF))[:: 2 if INTERPRET else 1]:
        whole = sdpa(q, k, v, mask)
        for s in _schedules(q, 64)[: 1 if INTERPRET else None]:
            for split in (False, True):
                same(sdpa(q, k, v, mask, chosen=s, split=split), whole)
                for rows in (slice(3, 4), slice(cut - 2, cut + 3)):
                    got = sdpa(q[:, :, rows], k, v, mask[rows], chosen=s, split=split)
                    same(got, whole[:, :, rows])


@law
@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (3, 1, 1, 70), (2, 1, 19, 20), (2, 3, 7, 33)])
def test_ranges_of_a_mask(shape):
    seen = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2).to(DEVICE)
    seen[..., 2:5] = True
    seen[0, 0, 0] = False
    for mask in (seen, torch.zeros(shape, device=DEVICE).masked_fill(~seen, -INF)):
        got = attention.visible_range(mask)
        key = torch.arange(shape[3], device=DEVICE)
        first = torch.where(seen, key, 1 << 30).amin(3)
        last = torch.where(seen, key, -1).amax(3)
        plain = (last < first) | (seen.sum(3) == last - first + 1)
        assert (got[..., 0] == first).all() and (got[..., 1] == last).all()
        assert (got[..., 2] == plain).all()
        assert (got[..., 3] == first).all()
        numbered = attention.visible_range(torch.where(seen, key + 5, 0).int())
        assert (numbered[..., :3] == got[..., :3]).all()
        assert (numbered[..., 3] == torch.where(seen.any(3), -4, 1 << 30)).all()
    b, h, n, s = shape
    q, k, v = _qkv(b, 4 if h == 1 else h, 1, n, s, 32, 32, FULL)
    want = attention.sdpa(q, k, v, seen, False, 0.3)
    same(attention.sdpa_visible(q, k, v, seen, attention.visible_range(seen), 0.3), want)
    one_by_one = [
        attention.sdpa(*(t[i : i + 1] for t in (q, k, v, seen)), False, 0.3) for i in range(b)
    ]
    same(torch.cat(one_by_one), want)


def _exact(q, k, v, mask=None):
    g = q.shape[1] // k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    s = q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask.cpu()
        s = s.masked_fill(~mask, -INF) if mask.dtype == torch.bool else s + mask.double()
    return s.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(g, 1)


@law
@real_dot
@each_dtype
def test_attention_accuracy(dtype):
    n = 100 if INTERPRET else 1000
    q, k, v = _qkv(2, 4, 4, n, n, 64, 64, dtype)
    for causal in (False, True):
        exact = _exact(q, k, v, _causal(n, n) if causal else None)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        no_worse(sdpa(q, k, v, causal=causal, dtype=dtype), theirs, exact)


# ------------------------------------------------------------------------------------ gradients


def _gradients(q, k, v, mask=None, causal=False):
    return attention_backward.sdpa_backward(q * 1.5, q, k, v, mask, causal, 0.3)


@law
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_obey_the_laws(dtype):
    n, kernel = 55 if INTERPRET else 500, registry.load_all()["sdpa_backward"]
    q, k, v = (randn(2, h, n, 16, dtype=dtype, seed=h) for h in (2, 1, 1))
    whole = _gradients(q, k, v, causal=True)
    visible = torch.ones(n, n, dtype=torch.bool, device=DEVICE).tril()
    bias = torch.zeros(n, n, dtype=dtype, device=DEVICE).masked_fill(~visible, -INF)
    for mask in (visible, bias):
        same(_gradients(q, k, v, mask), whole)
        known = attention_backward.sdpa_backward_visible(
            q * 1.5, q, k, v, mask, attention.visible_range(mask), 0.3
        )
        same(known, whole)
    same(_gradients(q[1:], k[1:], v[1:], causal=True), tuple(t[1:] for t in whole))
    views_of = zip(views(q), views(k), views(v), strict=True)
    for parts in views_of:
        same(_gradients(*parts, causal=True), whole)
    rows = slice(37, 46)
    same(_gradients(q[:, :, rows], k, v, visible[rows])[0], whole[0][:, :, rows])
    window = visible & ~visible.tril(-50)  # keys that no last query sees, and holes
    holes = window & (torch.arange(n, device=DEVICE) % 7 > 0)
    for mask in (window, holes):
        exact = kernel.reference(
            *(t.double().cpu() for t in (q * 1.5, q, k, v)), mask.cpu(), False, 0.3
        )
        for ours, true in zip(_gradients(q, k, v, mask), exact, strict=True):
            error = (ours.double().cpu() - true).norm() / true.norm()
            assert error < (1e-5 if dtype is FULL else 1e-2), error
    before = 5  # masked keys ahead, with NaN in them
    wide = [torch.cat([torch.full_like(t[:, :, :before], NAN), t], 2) for t in (k, v)]
    padded = torch.cat([torch.zeros_like(visible[:, :before]), visible], 1)
    found = _gradients(q, *wide, padded)
    same((found[0], *(t[:, :, before:] for t in found[1:])), whole)
    assert not any(t[:, :, :before].any() for t in found[1:])


@law
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_as_exact_as_pytorchs(dtype):
    n = 50 if INTERPRET else 300

    def eager(*qkv):
        leaves = [t.requires_grad_() for t in qkv]
        out = torch.nn.functional.scaled_dot_product_attention(
            *leaves, is_causal=causal, scale=0.2, enable_gqa=True
        )
        return torch.autograd.grad(out, leaves, leaves[0].detach())

    for groups, causal in ((2, False), (1, True)):
        qkv = [randn(1, h, n, 40, dtype=dtype, seed=h) for h in (2, groups, groups)]
        exact = eager(*(t.double().cpu() for t in qkv))
        theirs = eager(*(t.clone() for t in qkv))
        found = attention_backward.sdpa_backward(qkv[0], *qkv, None, causal, 0.2)
        for ours, other, true in zip(found, theirs, exact, strict=True):
            no_worse(ours, other, true)
