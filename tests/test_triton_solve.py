"""The laws of the Triton kernel of triangular systems."""

import pytest
import torch
from triton_set_up import DEVICE, INTERPRET, NAN, law, no_worse, randn, same, views

from bicompile import native, registry
from bicompile.kernels.solve import gpu

SIZES = ((3, 1), (5, 3), (70, 18)) if INTERPRET else ((1, 1), (5, 3), (64, 64), (200, 37))
each_form = pytest.mark.parametrize(
    ("upper", "unit"), [(False, False), (False, True), (True, False), (True, True)]
)


def system(k, n, upper, unit, batch=3):
    """A matrix that can be solved with, and NaN where nothing is read."""
    a = randn(batch, k, k) / k**0.5
    a = a + 2 * torch.eye(k, device=DEVICE)
    read = torch.ones(k, k, dtype=torch.bool, device=DEVICE)
    read = read.triu(int(unit)) if upper else read.tril(-int(unit))
    return a.masked_fill(~read, NAN), randn(batch, k, n, seed=1)


@law
@each_form
def test_systems_and_columns_stand_alone(upper, unit):
    for k, n in SIZES:
        a, b = system(k, n, upper, unit)
        whole = gpu.solve_triangular(a, b, upper, unit)
        same(gpu.solve_triangular(a[1:2], b[1:2], upper, unit), whole[1:2])
        same(gpu.solve_triangular(a, b[..., n // 2 :], upper, unit), whole[..., n // 2 :])
        for one, other in zip(views(a), views(b), strict=True):
            same(gpu.solve_triangular(one, other, upper, unit), whole)
        if not upper:  # what is solved first does not see what comes behind
            part = gpu.solve_triangular(a[:, : k - 1, : k - 1], b[:, : k - 1], False, unit)
            same(part, whole[:, : k - 1])


@law
@each_form
def test_the_numbers_are_those_of_the_cpu(upper, unit):
    native.load(["solve"])
    ours = registry.load_all()["solve_triangular"].op
    for k, n in SIZES:
        a, b = system(k, n, upper, unit)
        whole = gpu.solve_triangular(a, b, upper, unit).cpu()
        same(whole, ours(a.cpu(), b.cpu(), upper, unit))
        a, b = a.cpu().nan_to_num(), b.cpu()
        solve = torch.linalg.solve_triangular
        eager = solve(a, b, upper=upper, unitriangular=unit)
        no_worse(whole, eager, solve(a.double(), b.double(), upper=upper, unitriangular=unit))
