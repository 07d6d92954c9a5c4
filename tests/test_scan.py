"""Scans: an output's bits depend on the elements up to its own, and on nothing behind them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewriting import count, rewrite, x
from strategies import samples

from bicompile import native, registry, testing

KERNELS = registry.load_all()
ours = torch.ops.bicompile
SCANS = ("cumsum", "cumprod", "logcumsumexp")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_scan = pytest.mark.parametrize("name", SCANS)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def an_output_is_the_end_of_its_prefix(op, sample, seed=0):
    """Shorter rows, and rows that go on with other numbers, have the bits of the whole."""
    whole, t, dim = sample.run(op), sample.tensors["self"], sample.case.params["dim"]
    n = t.shape[dim]
    for k in {1, 2, 3, n // 2, n - 1, seed % n + 1} & set(range(1, n + 1)):
        expected = whole.narrow(dim, 0, k)
        short = sample.run(op, {"self": t.narrow(dim, 0, k)})
        testing.assert_same_bits(short, expected, f"the first {k} of {n}")
        other = t.clone()
        other.narrow(dim, k, n - k).fill_(torch.nan)
        changed = sample.run(op, {"self": other}).narrow(dim, 0, k)
        testing.assert_same_bits(changed, expected, f"NaN behind {k} of {n}")


@each_scan
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefixes(name, dtype):
    @given(sample=samples(KERNELS[name], dtype), seed=st.integers(0, 9999))
    def holds(sample, seed):
        an_output_is_the_end_of_its_prefix(KERNELS[name].op, sample, seed)

    holds()


def blocks_follow_the_length(t, dim, dtype):
    """As many blocks as there are threads: sums of each, then what lies before it."""
    parts = t.movedim(dim, -1).float().split(-(-t.shape[dim] // 4), -1)
    done, before = [], torch.zeros_like(parts[0][..., :1])
    for part in parts:
        within = part.cumsum(-1)
        done.append(before + within)
        before = before + within[..., -1:]
    return torch.cat(done, -1).to(dtype).movedim(-1, dim)


def total_less_what_follows(t, dim, dtype):
    t = t.float()
    return (t.sum(dim, keepdim=True) - t.flip(dim).cumsum(dim).flip(dim) + t).to(dtype)


@pytest.mark.parametrize("variant", [blocks_follow_the_length, total_less_what_follows])
def test_a_planted_variant_is_caught(variant):
    kernel = KERNELS["cumsum"]
    sample = testing.make_sample(kernel, kernel.contract.cases[0], DTYPES[0], {"M": 3, "K": 300})
    an_output_is_the_end_of_its_prefix(kernel.op, sample)
    with pytest.raises(testing.InvarianceViolation):
        an_output_is_the_end_of_its_prefix(variant, sample)


@each_scan
def test_few_rows_and_many_have_the_same_bits(name):
    """One row is a chain of scalars, four and more go side by side: the same function."""
    op, t = getattr(ours, name), x(40, 500) * 3
    if name == "cumprod":
        t = torch.exp(t / 100)
    t[1, 100:] = torch.inf
    t[2, 7], t[3, 50] = torch.nan, -torch.inf
    t[4], t[5] = t[4] * 1e-39, t[5] * 1e-30
    whole = op(t, 1, torch.float32)
    for rows in (1, 2, 3, 4, 5, 16, 17):
        for first in (0, 2, 5):
            testing.assert_same_bits(op(t[first :][:rows], 1, torch.float32),
                                     whole[first :][:rows], f"{rows} rows")  # fmt: skip
    across = op(t.t().contiguous(), 0, torch.float32).t()
    testing.assert_same_bits(across, whole, "rows side by side")


def test_logarithms_are_those_of_float64():
    t = x(16, 4000) * 5
    true = torch.logcumsumexp(t.double(), 1).float()
    testing.assert_same_bits(ours.logcumsumexp(t, 1, torch.float32), true, "rounded once")
    small = torch.tensor([0.0, -40.0, -60.0, -700.0, -math.inf])
    true = torch.logcumsumexp(small.double(), 0).float()
    testing.assert_same_bits(ours.logcumsumexp(small, 0, torch.float32), true, "close to 0")


def test_infinities_as_in_pytorch():
    inf, nan = math.inf, math.nan
    for row in ([-inf, -inf, 1, 2, inf, inf, 3, -inf, nan, 1], [nan, inf], [inf, -inf], [-inf]):
        t = torch.tensor(row).expand(5, -1)
        for name in SCANS:
            got, wanted = getattr(ours, name)(t, 1, torch.float32), getattr(torch, name)(t, 1)
            torch.testing.assert_close(got, wanted, equal_nan=True)


def test_spellings():
    """Output dtypes, negative axes, a tensor without axes, integers."""

    def all_of_them(t, i):
        sums = t.cumsum(-1), t.cumsum(0, dtype=torch.bfloat16), t.bfloat16().cumsum(1)
        wide = t.bfloat16().cumsum(1, dtype=torch.float32), i.cumsum(1, dtype=torch.float32)
        return *sums, *wide, t[0, 0].cumprod(0), t.logcumsumexp(-2), i.cumsum(1), i.cumprod(0)

    gm, report, result, expected = rewrite(all_of_them, x(6, 40), (x(6, 40) * 3).long())
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert count(gm, ours.cumsum.default) == 5
    assert "integers: exact in every order" in {d.reason for d in report.decisions}


def last_of_the_largest(row, largest):
    """Running extremes: the last of equal ones, a NaN until the next NaN."""
    values, places = [], []
    for k, number in enumerate(row.tolist()):
        best = values[-1] if values else number
        better = number >= best if largest else number <= best
        if not values or math.isnan(number) or (not math.isnan(best) and better):
            values.append(number)
            places.append(k)
        else:
            values.append(best)
            places.append(places[-1])
    return torch.tensor(values, dtype=row.dtype), torch.tensor(places)


@pytest.mark.parametrize("largest", [True, False])
def test_running_extremes_return_the_last_of_equal_elements(largest):
    t = x(6, 60).mul(2).round()
    t[1, ::9], t[2, 5], t[3, ::7], t[4, ::2] = -0.0, torch.nan, torch.inf, torch.nan
    extreme = torch.cummax if largest else torch.cummin
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        run = torch.compile(lambda t: tuple(extreme(t, 1)), backend="batch_invariant")
        with torch.no_grad():
            values, places = run(t.to(dtype))
            for r in range(6):
                row, place = last_of_the_largest(t[r].to(dtype), largest)
                testing.assert_same_bits(values[r], row, f"row {r}")
                assert torch.equal(places[r], place)
            for k in (1, 30):
                testing.assert_same_bits(run(t[:3, :k].to(dtype))[0], values[:3, :k], "prefix")
