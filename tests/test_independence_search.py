"""Random programs: where the proof says that rows are independent, no run shows otherwise.

Integers are used, so that every sum is exact and a difference is one of values read, not of order.
"""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from perturbed import Model

from bicompile.independence import MIXES, PROVEN, combining, prove_model, rules

ROWS = 4
BIG = 97  # keeps numbers small


def draw_step(draw, names):
    """One op as a function of the environment; sizes are read when it runs."""
    kind = draw(st.sampled_from(sorted(STEPS)))
    picks = [draw(st.sampled_from(names)) for _ in range(3)]
    numbers = [draw(st.integers(0, 3)) for _ in range(3)]
    return kind, picks, numbers


def axis(x, n):
    return n % max(x.dim(), 1)


def shapes(x):
    """Ways to regroup a shape."""
    s = list(x.shape)
    return [
        [*s[:-2], s[-2] * s[-1]] if len(s) > 1 else s,
        [s[0] * s[1], *s[2:]] if len(s) > 1 else s,
        [s[0], -1],
        [-1, s[-1]],
        [*s[:-1], 2, s[-1] // 2],
        [s[-1], *s[:-1]],
        [s[0] // 2, 2, *s[1:]],
        [-1],
    ]


STEPS = {
    "add": lambda x, y, z, a, b, c: x + y,
    "mul": lambda x, y, z, a, b, c: (x * y) % BIG,
    "where": lambda x, y, z, a, b, c: torch.where(x > 3, y, z),
    "sum": lambda x, y, z, a, b, c: x.sum(axis(x, a), keepdim=b > 1) % BIG,
    "amax": lambda x, y, z, a, b, c: x.amax(axis(x, a), keepdim=b > 1),
    "cumsum": lambda x, y, z, a, b, c: x.cumsum(axis(x, a)) % BIG,
    "sort": lambda x, y, z, a, b, c: x.sort(axis(x, a), stable=True)[b % 2],
    "flip": lambda x, y, z, a, b, c: x.flip(axis(x, a)),
    "roll": lambda x, y, z, a, b, c: x.roll(1, axis(x, a)),
    "tril": lambda x, y, z, a, b, c: x.tril(b - 1),
    "transpose": lambda x, y, z, a, b, c: x.transpose(axis(x, a), axis(x, b)),
    "unsqueeze": lambda x, y, z, a, b, c: x.unsqueeze(axis(x, a)),
    "view": lambda x, y, z, a, b, c: x.reshape(shapes(x)[(4 * a + b) % 8]),
    "like": lambda x, y, z, a, b, c: x.reshape(y.shape),
    "expand": lambda x, y, z, a, b, c: x.expand(y.shape),
    "repeat": lambda x, y, z, a, b, c: x.repeat(*[1 + (i == a) for i in range(x.dim())]),
    "slice": lambda x, y, z, a, b, c: x.narrow(axis(x, a), b % 2, x.shape[axis(x, a)] - b % 2),
    "halves": lambda x, y, z, a, b, c: x.split(x.shape[axis(x, a)] // 2, axis(x, a))[b % 2],
    "select": lambda x, y, z, a, b, c: x.select(axis(x, a), b % 2),
    "cat": lambda x, y, z, a, b, c: torch.cat([x, y], axis(x, a)),
    "stack": lambda x, y, z, a, b, c: torch.stack([x, y], axis(x, a)),
    "pad": lambda x, y, z, a, b, c: torch.nn.functional.pad(x, [0] * (2 * a) + [b % 2, c % 2]),
    "matmul": lambda x, y, z, a, b, c: (x @ y) % BIG,
    "arange": lambda x, y, z, a, b, c: torch.arange(x.shape[axis(x, a)]),
    "count": lambda x, y, z, a, b, c: torch.arange(x.numel()).view(x.shape) % 5,
    "ones": lambda x, y, z, a, b, c: torch.ones_like(x),
    "one hot": lambda x, y, z, a, b, c: torch.nn.functional.one_hot(x % 3, 3),
    "index": lambda x, y, z, a, b, c: x[y % 2],
    "index 2": lambda x, y, z, a, b, c: x[:, y % 2],
    "index pair": lambda x, y, z, a, b, c: x[y % 2, z % 2],
    "own row": lambda x, y, z, a, b, c: x[torch.arange(y.shape[0]), y % 2],
    "own row, all": lambda x, y, z, a, b, c: x[torch.arange(x.shape[0])],
    "gather": lambda x, y, z, a, b, c: x.gather(axis(x, a), y % 2),
    "scatter": lambda x, y, z, a, b, c: x.scatter(axis(x, a), y % 2, b),
    "scatter_add": lambda x, y, z, a, b, c: x.scatter_add(axis(x, a), y % 2, z) % BIG,
    "index_add": lambda x, y, z, a, b, c: x.index_add(axis(x, a), y % 2, z) % BIG,
    "index_copy": lambda x, y, z, a, b, c: x.index_copy(axis(x, a), torch.tensor([b % 2]), y),
    "index_put": lambda x, y, z, a, b, c: x.index_put((y % 2,), z),
    "put own row": lambda x, y, z, a, b, c: x.index_put((torch.arange(x.shape[0]), y % 2), z),
    "select_scatter": lambda x, y, z, a, b, c: x.select_scatter(y, axis(x, a), b % 2),
    "slice_scatter": lambda x, y, z, a, b, c: x.slice_scatter(y, axis(x, a), b % 2),
    "argsort": lambda x, y, z, a, b, c: x.reshape(-1).argsort(stable=True),
    "put back": lambda x, y, z, a, b, c: x[y][y.argsort()],
    "routed": lambda x, y, z, a, b, c: routed(x, y),
}


def routed(x, y):
    """Sorted by a key, made other numbers in that order, put back."""
    order = y.reshape(-1).argsort(stable=True)
    back = torch.empty_like(order).index_put((order,), torch.arange(order.shape[0]))
    return (x.reshape(order.shape[0], -1)[order] * 3 % BIG)[back]


def interpret(program, x, y):
    """Run the steps; the table has no batch axis."""
    table = torch.arange(20).view(4, 5) * 7 % 11
    env = [x, y, table]
    for kind, picks, numbers in program:
        env.append(STEPS[kind](*(env[p] for p in picks), *numbers))
    return tuple(env[3:])


def inputs(rows, seed):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 9, (rows, 4, 6), generator=rng),
        torch.randint(0, 9, (rows, 4), generator=rng),
    )


@st.composite
def programs(draw):
    """Steps that run on real inputs; those that do not are left out as they are drawn."""
    env = [*inputs(ROWS, 0), torch.arange(20).view(4, 5)]
    program = []
    for _ in range(draw(st.integers(4, 12))):
        kind, picks, numbers = draw_step(draw, range(len(env)))
        try:
            result = STEPS[kind](*(env[p] for p in picks), *numbers)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        if 0 < result.numel() < 5000:
            env.append(result)
            program.append((kind, picks, numbers))
    hypothesis.assume(program)
    return program


def check(program):
    """Every proven output is that of its own row: others changed, moved or left out."""
    model = Model(lambda m, x, y: interpret(program, x, y))
    found = prove_model(model, *inputs(ROWS, 0))
    if len(found) != len(program):
        return found  # not traced
    for seed in range(3):
        given = inputs(ROWS, seed)
        whole = interpret(program, *given)
        order = torch.tensor([2, 0, 3, 1])
        other = [torch.where(torch.arange(ROWS).view(-1, *[1] * (t.dim() - 1)) == 1, t, (t + 5) % 9)
                 for t in given]  # fmt: skip
        changed = interpret(program, *other)
        moved = interpret(program, *(t[order] for t in given))
        for i, f in enumerate(found):
            if f.verdict != PROVEN:
                continue
            if f.axis is None:
                assert torch.equal(whole[i], changed[i]), (f, program)
                continue
            a, b, c = (rows_of(t[i], f.axis) for t in (whole, changed, moved))
            if a is not None:
                assert torch.equal(a[:, 1], b[:, 1]), ("changed", f, program)
                assert torch.equal(a[:, order], c), ("moved", f, program)
    return found


def rows_of(x, axis):
    """[before, rows, ...], or None where more than rows lie along the axis."""
    return x.movedim(axis, 0).unsqueeze(0) if x.shape[axis] == ROWS else None


def searched(examples):
    return hypothesis.settings(
        max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck), deadline=None
    )


@searched(8)
@hypothesis.given(programs())
def test_what_is_proven_holds(program):
    check(program)


@pytest.mark.soak
@searched(1000)
@hypothesis.given(programs())
def test_what_is_proven_holds_in_a_long_search(program):
    check(program)


def test_a_wrong_rule_is_found(monkeypatch):
    """The search can fail: with the rule of a pointwise op in its place, `flip` is "proven"."""
    wrong = rules.Entry(combining.pointwise)
    program = [("flip", [0, 0, 0], [0, 0, 0])]
    assert [f.verdict for f in check(program)] == [MIXES]
    monkeypatch.setitem(rules.TABLE, "aten::flip", wrong)
    with pytest.raises(AssertionError, match="changed"):
        check(program)
