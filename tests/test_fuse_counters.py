"""Counters of a static cache advance together."""

from __future__ import annotations

import pytest
import torch

from bicompile import testing
from bicompile.report import REPORTS


def advance(counters, steps):
    positions = []
    for counter, step in zip(counters, steps, strict=True):
        positions.append(counter + torch.arange(3, device=counter.device))
        counter.add_(step)
    return positions


def counters(*numbers, device="cpu", **options):
    return [torch.tensor(n, device=device, **options) for n in numbers]


def together(function, *args):
    """What a compiled function returns, and the lines of the sums that became one."""
    torch._dynamo.reset()
    result = torch.compile(function, backend="batch_invariant")(*args)
    return result, [d.node for d in REPORTS[-1].decisions if "_foreach_add" in str(d.became)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_counters_advance_in_one_call(device):
    ours, theirs = counters(3, 5, 7, device=device), counters(3, 5, 7, device=device)
    places = [n.data_ptr() for n in ours]
    for _ in range(2):  # what is read is what was there before
        result, found = together(advance, ours, (2, 2, 2))
        testing.assert_same_bits(result, advance(theirs, (2, 2, 2)), "positions")
        assert len(found) == 3
    assert [n.data_ptr() for n in ours] == places
    assert [int(n) for n in ours] == [7, 9, 11]


def test_of_each_step_and_dtype_its_own():
    mixed = [*counters(1, 2, 3), *counters(4, 5, dtype=torch.int32), *counters(6.0, 7.0)]
    _, found = together(advance, mixed, (1, 1, 2, 1, 1, 1, 1))
    assert len(found) == 4
    assert [float(n) for n in mixed] == [2, 3, 5, 5, 6, 7, 8]


def test_what_others_read_is_left_alone():
    def read_after(counters):
        for counter in counters:
            counter.add_(1)
        return [counter * 2 for counter in counters]

    numbers = counters(1, 2)
    result, found = together(read_after, numbers)
    assert not found
    assert [int(n) for n in (*numbers, *result)] == [2, 3, 4, 6]


def test_numbers_that_are_set_are_left_alone():
    def take_over(counters):
        first, second = counters
        first.copy_(second + 1)
        second.copy_(second * 2 + 1)

    numbers = counters(1, 5)
    _, found = together(take_over, numbers)
    assert not found
    assert [int(n) for n in numbers] == [6, 11]
