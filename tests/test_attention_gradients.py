"""Laws of attention's gradient: a query's by itself, those of keys and values in pinned order."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import bicompile
from bicompile import native, registry, testing

BACKWARD = registry.load_all()["sdpa_backward"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
lengths = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 129])


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


class Problem:
    """Causal self-attention of one sequence, two query heads to a key head."""

    def __init__(self, dtype, device, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda h: torch.randn(1, h, length, 16, generator=generator).to(device, dtype)  # noqa: E731
        self.grad, self.q, self.k, self.v = draw(4), draw(4), draw(2), draw(2)
        self.visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def run(self, mask=None, causal=False, op=BACKWARD.op):
        return op(self.grad, self.q, self.k, self.v, mask, causal, 0.25)

    def change(self, **tensors):
        changed = object.__new__(Problem)
        changed.__dict__ = {**self.__dict__, **tensors}
        return changed


@each_device
@each_dtype
@given(length=lengths, seed=st.integers(0, 9))
def test_spellings_of_a_mask_agree(device, dtype, length, seed):
    p = Problem(dtype, device, length, seed)
    expected = p.run(causal=True)
    infinite = torch.zeros_like(p.visible, dtype=dtype).masked_fill(~p.visible, -torch.inf)
    for mask in (p.visible, infinite):
        for shape in ((length, length), (1, 4, length, length)):
            testing.assert_same_bits(p.run(mask.expand(shape)), expected, "a mask")


def rows_alone(op, dtype, device, length, start, end, seed=0):
    """The gradients of queries start to end, with the other queries and without them."""
    p = Problem(dtype, device, length, seed)
    rows = slice(start, end)
    chunk = p.change(grad=p.grad[:, :, rows], q=p.q[:, :, rows])
    return chunk.run(p.visible[rows], op=op)[0], p.run(p.visible, op=op)[0][:, :, rows]


@each_device
@each_dtype
@given(length=lengths, seed=st.integers(0, 9), data=st.data())
def test_a_query_does_not_see_the_others(device, dtype, length, seed, data):
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    alone, among = rows_alone(BACKWARD.op, dtype, device, length, start, end, seed)
    testing.assert_same_bits(alone, among, "a chunk of queries")


def padded(p, before, after, junk, own=0.0):
    """The problem with masked keys around it, and queries that see nothing before it."""
    length = p.q.shape[2]

    def widen(t, value, ahead, behind):
        shape = list(t.shape)
        shape[2] = ahead + length + behind
        out = torch.full(shape, value, dtype=t.dtype, device=t.device)
        out[:, :, ahead : ahead + length] = t
        return out

    mask = torch.zeros(before + length, before + length + after, dtype=torch.bool)
    mask[before:, before : before + length] = p.visible.cpu()
    wide = p.change(
        q=widen(p.q, junk, before, 0),
        grad=widen(p.grad, own, before, 0),
        k=widen(p.k, junk, before, after),
        v=widen(p.v, junk, before, after),
    )
    return wide, mask.to(p.q.device), slice(before, before + length)


@each_device
@each_dtype
@pytest.mark.parametrize("junk", [0.0, 5.0, math.nan, math.inf])
@given(length=lengths, seed=st.integers(0, 9), data=st.data())
def test_masked_keys_and_padded_queries_are_absent(device, dtype, junk, length, seed, data):
    """On a GPU tiles of queries are counted from the first: there only the queries' are equal."""
    p = Problem(dtype, device, length, seed)
    sizes = st.sampled_from([0, 1, 3, 16, 33, 64, 100])
    wide, mask, own = padded(p, data.draw(sizes), data.draw(sizes), junk)
    found, expected = wide.run(mask), p.run(causal=True)
    count = 3 if device == "cpu" else 1
    for a, e in zip(found[:count], expected[:count], strict=True):
        testing.assert_same_bits(a[:, :, own], e, "with padding")
        assert not a[:, :, : own.start].any() and not a[:, :, own.stop :].any()


@each_device
@each_dtype
def test_batch_entries_and_heads_are_apart(device, dtype):
    problems = [Problem(dtype, device, 70, seed) for seed in range(3)]
    names = ("grad", "q", "k", "v")
    together = problems[0].change(
        **{n: torch.cat([getattr(p, n) for p in problems]) for n in names}
    )
    for number, p in enumerate(problems):
        for whole, alone in zip(together.run(causal=True), p.run(causal=True), strict=True):
            testing.assert_same_bits(whole[number : number + 1], alone, f"entry {number}")


@each_device
def test_a_seen_nan_is_a_nan_and_others_are_not(device):
    p = Problem(torch.float32, device, 20)
    q = p.q.clone()
    q[:, :, 7] = torch.nan
    (dq, dk, dv), expected = p.change(q=q).run(causal=True), p.run(causal=True)
    assert dq[:, :, 7].isnan().all() and dk[:, :, :8].isnan().all() and dv[:, :, :8].isnan().all()
    others = torch.arange(20) != 7
    testing.assert_same_bits(dq[:, :, others], expected[0][:, :, others], "other queries")
    for found, e in zip((dk, dv), expected[1:], strict=True):
        testing.assert_same_bits(found[:, :, 8:], e[:, :, 8:], "keys behind the NaN")


@each_device
@each_dtype
@pytest.mark.parametrize("causal", [True, False])
def test_errors_are_no_worse_than_pytorchs(device, dtype, causal):
    p = Problem(dtype, device, 200)
    wide = p.change(**{n: getattr(p, n).double() for n in ("grad", "q", "k", "v")})
    true = wide.run(causal=causal, op=BACKWARD.reference)
    pairs = zip(p.run(causal=causal), p.run(causal=causal, op=BACKWARD.eager), true, strict=True)
    for ours, torchs, t in pairs:
        errors = [(x.double() - t).square().mean().sqrt() for x in (ours, torchs, t.to(dtype))]
        assert errors[0] <= 1.02 * max(errors[1:]), errors


def test_value_size_may_differ():
    g, q, k, v = (torch.randn(2, h, 9, d) for h, d in ((4, 40), (4, 24), (2, 24), (2, 40)))
    found = BACKWARD.op(g, q, k, v, None, True, 0.2)
    true = BACKWARD.reference(g.double(), q.double(), k.double(), v.double(), None, True, 0.2)
    for a, t in zip(found, true, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- planted variants


def chain(weights, rows):
    """sum over n of weights[..., m, n] * rows[..., n, d], one term after the other."""
    out = torch.zeros_like(rows[..., :1, :] * weights[..., :1])
    for n in range(rows.shape[-2]):
        out = out + weights[..., n : n + 1] * rows[..., n : n + 1, :]
    return out


def composed(grad, q, k, v, mask, causal, scale, *, products=chain):
    """The gradient, written out."""
    shared = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(shared, 1).float() for t in (k, v))
    score = ((q.float().unsqueeze(-2) * keys.unsqueeze(-3)).sum(-1) * scale).nan_to_num()
    score = score.masked_fill(~mask, -torch.inf)
    e = torch.exp(score - score.amax(-1, keepdim=True)).nan_to_num(0.0)
    one = e.new_ones(e.shape[-1], 1)
    p = e / chain(e, one).clamp(min=1e-30)
    dp = (grad.float().unsqueeze(-2) * values.unsqueeze(-3)).sum(-1)
    ds = p * (dp - chain(p * dp, one)) * scale
    dk, dv = (
        t.unflatten(1, (-1, shared)).sum(2)
        for t in (products(ds.mT, q.float()), products(p.mT, grad.float()))
    )
    return products(ds, keys), dk, dv


def halves(weights, rows):
    """Two chains that meet: where depends on how many terms there are."""
    first, second = slice(rows.shape[-2] // 2), slice(rows.shape[-2] // 2, None)
    parts = (chain(weights[..., part], rows[..., part, :]) for part in (first, second))
    return sum(parts)


def test_planted_variants_are_caught():
    """Another order for few rows, and one that follows the padding; a plain chain passes."""
    follows_rows = lambda w, x: (halves if w.shape[-2] < 16 else chain)(w, x)  # noqa: E731
    p = Problem(torch.float32, "cpu", 33)
    wide, mask, own = padded(p, 20, 0, 5.0)
    for products, by_rows, by_padding in (
        (chain, True, True),
        (follows_rows, False, True),
        (halves, True, False),
    ):
        op = lambda *args, f=products: composed(*args, products=f)  # noqa: E731
        alone, among = rows_alone(op, torch.float32, "cpu", 65, 50, 61)
        assert torch.equal(alone, among) == by_rows
        found, expected = wide.run(mask, op=op), p.run(p.visible, op=op)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a[:, :, own], e) == by_padding


# ----------------------------------------------------------------------------- repeated K and V


def normal(heads, dtype):
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(2, heads, 6, 8, generator=generator).to(dtype)


def gradients_of(repeat, more=lambda k: 0.0, dtype=torch.bfloat16, compile=bicompile.compile):
    """Of queries, keys and values through attention of grouped queries, repeated or not."""

    def attend(q, k, v):
        if repeat:
            k, v = (repeat(t, q.shape[1] // t.shape[1]) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)
        return out + more(k)

    torch._dynamo.reset()
    q, k, v = (normal(n, dtype).requires_grad_() for n in (4, 2, 2))
    compile(attend)(q, k, v).backward(normal(4, dtype))
    return q.grad, k.grad, v.grad


REPEATS = {
    "transformers": lambda t, n: (
        t[:, :, None, :, :]
        .expand(t.shape[0], t.shape[1], n, *t.shape[2:])
        .reshape(t.shape[0], t.shape[1] * n, *t.shape[2:])
    ),
    "repeat_interleave": lambda t, n: t.repeat_interleave(n, 1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_gradients_of_repeated_heads_are_summed_by_the_op(repeat, dynamic):
    """Each head's gradient is not rounded before the sum, whatever the graph knows of sizes."""
    compile = functools.partial(torch.compile, backend="batch_invariant", dynamic=dynamic)
    found = gradients_of(repeat, compile=compile)
    testing.assert_same_bits(found, gradients_of(None), "repeated")


def test_gradients_of_repeated_heads_that_others_read_are_left_alone():
    given = REPEATS["transformers"], lambda k: k * 2, torch.float32
    torch.testing.assert_close(gradients_of(*given), gradients_of(*given, compile=lambda f: f))
