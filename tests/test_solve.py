"""Triangular systems: the order of a chain, and what PyTorch's forms become."""

from __future__ import annotations

import pytest
import torch
from rewriting import rewrite, x

from bicompile import native, registry, testing
from bicompile.testing.contents import CONTENTS

solve = registry.load_all()["solve_triangular"].op


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("size", [4, 33, 130])
def test_a_column_alone_has_the_order_that_it_has_among_others(size, upper):
    """Sums in double hide their order from ordinary numbers; terms that cancel show it."""
    generator = torch.Generator().manual_seed(size)
    matrix = torch.eye(size).repeat(3, 1, 1)
    terms = CONTENTS["cancelling"]([3, size - 1], 1, generator)
    matrix[:, 0 if upper else -1, slice(1, None) if upper else slice(-1)] = terms
    right = torch.ones(3, size, 37)
    whole = solve(matrix, right, upper, False)
    for columns in (slice(1), slice(3), slice(20), slice(35, 37)):
        part = solve(matrix[1:2], right[1:2, :, columns], upper, False)
        testing.assert_same_bits(part, whole[1:2, :, columns], f"{columns}")


FORMS = {
    "one system": lambda t: (t[0, :, :5], t[0]),
    "more axes": lambda t: (t[..., :5], t[None].repeat(2, 1, 1, 1)),
    "one matrix for all": lambda t: (t[0, :, :5], t),
}


@pytest.mark.parametrize("options", [{}, {"left": False}, {"unitriangular": True}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, options):
    def function(t):
        matrix, right = FORMS[form](t)
        right = right if options.get("left", True) else right.mT
        matrix = matrix + 3 * torch.eye(5)
        return torch.linalg.solve_triangular(matrix, right, upper=True, **options)

    _, report, ours, true = rewrite(function, x(3, 5, 8))
    assert any(str(solve) == d.became for d in report.decisions)
    torch.testing.assert_close(ours, true)
