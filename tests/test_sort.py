"""Sorting and selecting: stable, ties pinned, whatever the dtype and the number of rows."""

from __future__ import annotations

import pytest
import torch
from rewriting import rewrite, x

from bicompile import native, registry, testing

KERNELS = registry.load_all()
ours = torch.ops.bicompile


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


TYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def tied(*shape, dtype=torch.float32):
    """Numbers of which many are equal; in floating point with NaN, infinities and both zeros."""
    t = x(*shape).mul(3).round()
    if dtype.is_floating_point:
        flat = t.view(-1)
        flat[::7], flat[3::11], flat[5::13] = torch.nan, torch.inf, -torch.inf
        flat[::5] = -0.0
    return t.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
def test_topk_is_a_stable_sort(dtype, largest):
    for shape, dim in (((5, 300), 1), ((40, 3), 0), ((2, 7, 3), 1)):
        t = tied(*shape, dtype=dtype)
        n = t.shape[dim]
        wanted = torch.sort(t, dim=dim, descending=largest, stable=True)
        for k in {1, 2, n // 3, n - 1, n}:
            values, indices = ours.topk(t, k, dim, largest)
            assert torch.equal(indices, wanted.indices.narrow(dim, 0, k))
            testing.assert_same_bits(values, wanted.values.narrow(dim, 0, k), f"{k} of {n}")


def unstable_for_many_rows(self, k, dim, largest):
    """What PyTorch's own op does on a GPU."""
    if len(self) < 8:
        return ours.topk(self, k, dim, largest)
    values, indices = ours.topk(self.flip(dim), k, dim, largest)
    return values, self.shape[dim] - 1 - indices


def test_a_planted_variant_is_caught():
    case = KERNELS["topk"].contract.cases[0]
    sample = testing.make_sample(KERNELS["topk"], case, torch.float32, {"M": 9, "K": 33})
    sample.tensors["self"].round_()
    with pytest.raises(testing.InvarianceViolation):
        testing.rows_do_not_depend_on_the_batch(unstable_for_many_rows, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_sorts_become_stable(dtype):
    def all_of_them(t):
        return *torch.sort(t), *t.sort(0, descending=True), t.argsort(descending=True), *t.topk(2)

    _, _, result, _ = rewrite(all_of_them, tied(6, 40, dtype=dtype))
    rising, falling, down = (
        torch.sort(tied(6, 40, dtype=dtype), dim=d, descending=f, stable=True)
        for d, f in ((1, False), (0, True), (1, True))
    )
    wanted = (*rising, *falling, down.indices, down.values[:, :2], down.indices[:, :2])
    for got, expected in zip(result, wanted, strict=True):
        testing.assert_same_bits(got, expected, "sort")


def test_the_middle_and_its_position():
    t = tied(6, 9)
    t[1] = t[1].nan_to_num(0.0)
    for dim in (0, 1):
        rising = torch.sort(t, dim=dim, stable=True)
        _, _, (low, low_at), _ = rewrite(lambda t, d=dim: torch.kthvalue(t, 3, d), t)
        testing.assert_same_bits(low, rising.values.select(dim, 2), "third value")
        assert torch.equal(low_at, rising.indices.select(dim, 2))
        torch._dynamo.reset()
        _, _, (middle, at), eager = rewrite(lambda t, d=dim: torch.median(t, d), t)
        testing.assert_same_bits(middle, eager.values, "median")
        has_nan = t.isnan().any(dim)
        lowest = rising.indices.select(dim, (t.shape[dim] - 1) // 2)
        assert torch.equal(at, torch.where(has_nan, t.isnan().int().argmax(dim), lowest))
