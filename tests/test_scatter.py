"""Sums by index: the list of an element's sources, in order, is all that its bits depend on."""

from __future__ import annotations

import functools

import pytest
import torch
from rewriting import count, rewrite, x

import bicompile
from bicompile import native, testing
from bicompile.errors import UnsupportedOp
from bicompile.testing.contents import CONTENTS

ours = torch.ops.bicompile
rows_known = functools.partial(torch.compile, backend="batch_invariant")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def elsewhere_changes_nothing(op, dtype):
    """Row 2 alone, and among sources of other rows before, between and behind its own."""
    start, sources = x(5, 33, dtype=dtype), x(40, 33, dtype=dtype) * 100
    index = torch.tensor([2, 0, 2, 4, 2, 2, 1, 2] * 5)
    own = index == 2
    among = op(start, index, sources, 1.0)[2]
    alone = op(start[2:3], torch.zeros(int(own.sum()), dtype=torch.long), sources[own], 1.0)[0]
    testing.assert_same_bits(among, alone, "a row among others")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rows_change_nothing(dtype):
    elsewhere_changes_nothing(ours.index_add, dtype)


def pairs_of_positions(self, index, source, alpha):
    """A tree over neighbouring positions, whichever rows they go to."""
    half = len(index) // 2
    first = torch.index_add(torch.zeros_like(self), 0, index[:half], source[:half])
    second = torch.index_add(torch.zeros_like(self), 0, index[half:], source[half:])
    return self + (first + second)


def test_a_planted_variant_is_caught():
    start, sources = x(2, 33), x(40, 33) * 100
    index = torch.cat([torch.zeros(7, dtype=torch.long), torch.ones(20), torch.zeros(13)]).long()
    own = index == 0
    for op, holds in ((ours.index_add, True), (pairs_of_positions, False)):
        among = op(start, index, sources, 1.0)[0]
        alone = op(start[:1], index[own], sources[own], 1.0)[0]
        assert torch.equal(among, alone) == holds


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_every_spelling_has_the_same_bits(dim):
    t, places = x(6, 5, 4), torch.tensor([3, 1, 3, 0, 3])
    shape = list(t.shape)
    shape[dim] = 5
    source = x(*shape) * 10
    spread = places.view([5 if d == dim % 3 else 1 for d in range(3)]).expand(shape)
    gm, _, added, expected = rewrite(lambda t, i, s: t.index_add(dim, i, s), t, places, source)
    assert count(gm, ours.index_add.default) == 1
    torch.testing.assert_close(added, expected)
    torch._dynamo.reset()
    _, _, scattered, _ = rewrite(lambda t, i, s: t.scatter_add(dim, i, s), t, spread, source)
    testing.assert_same_bits(scattered, added, "scatter_add")
    if dim == 0:
        put = lambda t, i, s: t.index_put((i,), s, accumulate=True)  # noqa: E731
        _, _, result, _ = rewrite(put, t, places, source)
        testing.assert_same_bits(result, added, "index_put")


def test_reductions_by_index():
    """The largest is exact in any order; products and means are refused."""

    def reduce(how):
        return lambda t, i: t.scatter_reduce(0, i, t * 2, how)

    t, index = x(6, 4), torch.arange(24).view(6, 4) % 3
    for how in ("amax", "amin", "sum"):
        torch._dynamo.reset()
        _, _, result, expected = rewrite(reduce(how), t, index)
        torch.testing.assert_close(result, expected)
    for how in ("prod", "mean"):
        torch._dynamo.reset()
        with pytest.raises(UnsupportedOp):
            rewrite(reduce(how), t, index)


@pytest.mark.parametrize("compile", [bicompile.compile, rows_known], ids=["any", "known"])
@pytest.mark.parametrize("places", [1, 3])
def test_the_gradient_of_a_gather(compile, places):
    """A trainer's log-probabilities of chosen tokens: the batch of the index is another size."""

    def gather(t, i):
        return t.log_softmax(-1).gather(-1, i).square().sum()

    for rows in (6, 4):  # gather lets the index have fewer
        t, index = x(6, 5, 37), torch.randint(0, 37, (rows, 5, places))
        results = []
        for function in (gather, compile(gather)):
            leaf = t.clone().requires_grad_()
            function(leaf, index).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results[::-1])
        assert not results[1][rows:].any()


def test_columns_do_not_depend_on_their_number():
    """Sums in double hide their order from ordinary numbers; terms that cancel show it."""
    generator = torch.Generator().manual_seed(0)
    source = CONTENTS["cancelling"]([90, 21], 0, generator)
    self, index = x(2, 21), torch.ones(90, dtype=torch.long)
    whole = ours.index_add(self, index, source, 1.0)
    for columns in (slice(1), slice(3, 5), slice(4), slice(16, 21), slice(17)):
        part = ours.index_add(self[:, columns], index, source[:, columns], 1.0)
        testing.assert_same_bits(part, whole[:, columns], str(columns))


def test_sources_are_added_in_their_order():
    generator = torch.Generator().manual_seed(0)
    source = CONTENTS["cancelling"]([90, 21], 0, generator)
    factor = torch.tensor(0.3).double()  # an argument in single precision
    forward, backward = (torch.zeros(21, dtype=torch.float64) for _ in range(2))
    for k in range(90):
        forward += source[k].double() * factor
        backward += source[89 - k].double() * factor
    assert not torch.equal(forward.float(), backward.float()), "the order is hidden"
    result = ours.index_add(torch.zeros(1, 21), torch.zeros(90, dtype=torch.long), source, 0.3)
    testing.assert_same_bits(result[0], forward.float(), "one chain in double, from the first on")


def test_a_target_that_does_not_count_itself():
    self, index = torch.full((4, 3), 100.0), torch.tensor([[0, 1, 1], [1, 1, 3]])
    source = torch.randn(2, 3)

    def sums(self, index, source):
        return self.scatter_reduce(0, index, source, "sum", include_self=False)

    _, _, result, expected = rewrite(sums, self, index, source)
    torch.testing.assert_close(result, expected)


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(RuntimeError, match="out of range"):
        ours.index_add(x(2, 3), torch.tensor([2]), x(1, 3), 1.0)


def test_a_place_behind_a_row_is_none_of_the_next_row():
    f = torch.compile(lambda t, i: t.scatter_add(1, i, t), backend="batch_invariant")
    assert f(torch.ones(2, 3), torch.tensor([[0, 1, 2], [2, 1, 0]])).eq(2).all()
    for outside in (3, -1):
        with pytest.raises(RuntimeError, match="out of range"):
            f(torch.ones(2, 3), torch.tensor([[0, 1, outside], [2, 1, 0]]))


def test_nothing_to_add():
    """A size that follows from the number of elements does not, if there are none."""
    empty = torch.zeros(0, dtype=torch.long)
    for t in (x(3, 2), x(0)):
        run = torch.compile(
            lambda t: t.put(empty, t.new_zeros(0), accumulate=True), backend="batch_invariant"
        )
        assert torch.equal(run(t), t)


def test_no_places():
    function = functools.partial(torch.scatter_add, dim=1)
    t, index = x(3, 4), torch.zeros(3, 0, dtype=torch.int64)
    _, _, result, expected = rewrite(lambda a, b: function(a, index=b, src=a), t, index)
    testing.assert_same_bits(result, expected, "no places")


put = functools.partial(torch.ops.aten.index_put, accumulate=True)
PUTS = {
    "side by side": lambda t, i, s: put(t, [i, i - 2], s[:, :, None].expand(-1, -1, 5)),
    "in the middle": lambda t, i, s: put(t, [None, i[:, :1], i], s),
    "apart": lambda t, i, s: put(t, [i, None, i[0]], s[..., None]),
    "the last axis": lambda t, i, s: put(t, [None, None, i], s),
    "no place": lambda t, i, s: put(t, [i[:0], i[:0]], s[:0, :, None]),
}


@pytest.mark.parametrize("name", PUTS)
def test_places_of_several_axes(name):
    t, index, source = x(6, 6, 5), torch.tensor([[3, 1, 0], [2, 3, 1]]), x(2, 3) * 10
    _, _, result, expected = rewrite(PUTS[name], t, index, source)
    torch.testing.assert_close(result, expected)


def test_a_place_behind_an_axis_is_none_of_the_next_row():
    run = rows_known(lambda t, i: put(t, [i * 0, i], t[0]))
    assert run(torch.ones(2, 3), torch.tensor([0, 1, -1])).sum() == 9
    for outside in (3, -4):
        with pytest.raises(RuntimeError, match="out of range"):
            run(torch.ones(2, 3), torch.tensor([0, 1, outside]))


def test_what_is_not_reached_stays():
    """The index may have fewer rows than what is added to."""
    t, index, source = x(6, 5, 4), torch.tensor([0, 3, 3, 4] * 15).view(4, 5, 3), x(5, 5, 4)
    _, _, result, expected = rewrite(lambda t, i, s: t.scatter_add(1, i, s), t, index, source)
    torch.testing.assert_close(result, expected)
    testing.assert_same_bits(result[4:], t[4:], "rows")
    testing.assert_same_bits(result[..., 3:], t[..., 3:], "columns")
