"""The axes of a tensor as factors: where in it the rows of the batch lie.

An axis of size H * B, heads before rows, is the factors ``(H plain, B row)``, outermost first; an
axis of size 1 has none.  A view only regroups the factors of all axes, a broadcast joins those of
several tensors.  What cannot be regrouped without cutting a row, or joined without one row meeting
another, is a `Stop`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

PROVEN, MIXES, UNDECIDED = "proven", "mixes", "undecided"


@dataclass(frozen=True)
class Poison:
    """The value of a node about which nothing is known any more, and why."""

    verdict: str
    reason: str
    node: str | None = None
    line: str | None = None


class Stop(Exception):
    """A rule cannot go on; `poison` names an earlier node if that one is the cause."""

    def __init__(self, verdict: str, reason: str, poison: Poison | None = None) -> None:
        super().__init__(reason)
        self.verdict, self.reason, self.poison = verdict, reason, poison


class Tag(enum.Enum):
    """How the elements along a factor differ."""

    PLAIN = "plain"
    """In any way that does not depend on rows."""
    SAME = "same"
    """Not at all."""
    ROW = "row"
    """The element at b is computed from row b, in the same way for each b."""
    SORTED = "sorted"
    """As rows are, but in an order that depends on all rows (`Order`)."""


@dataclass(frozen=True, eq=False)  # a sort that is run twice gives two orders
class Order:
    """A permutation of what lies along `axis`, as a sort of all rows gives it.

    `poison` names the sort, for the case that the rows are not put back.
    """

    axis: tuple[Factor, ...]
    poison: Poison


@dataclass(frozen=True)
class Factor:
    """A part of an axis."""

    size: Any
    tag: Tag = Tag.PLAIN
    order: Order | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sympy.sympify(self.size))

    @property
    def fixed(self) -> bool:
        """Whether it holds rows, so that it cannot be cut."""
        return self.tag in (Tag.ROW, Tag.SORTED)


Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Content:
    """What the numbers in a tensor of integers are, where that matters.

    Args:
        kind: "row" the row's own number; "iota" 0, 1, 2 ...; "index" numbers below `size`; "keys"
            sorted numbers below `size`; "order" a sort's permutation, divided by `size`; "inverse"
            its inverse; "counts" and "ends" how many keys there are of each number, and their sums.
        order: the permutation that it belongs to.
        size: see above.
        poison: what a use as ordinary numbers means; None if they are as good as any.
    """

    kind: str
    order: Order | None = None
    size: Any = 1
    poison: Poison | None = None


@dataclass(frozen=True)
class Value:
    """What is known of a tensor."""

    axes: tuple[Axis, ...]
    content: Content | None = None

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def shape(self) -> list[Any]:
        """The sizes."""
        return [size_of(axis) for axis in self.axes]

    @property
    def fixed(self) -> list[Factor]:
        """The factors that hold rows."""
        return [f for axis in self.axes for f in axis if f.fixed]


def size_of(axis: Iterable[Factor]) -> Any:
    """Product of the sizes."""
    return math.prod((f.size for f in axis), start=sympy.Integer(1))


def plain(size: Any) -> Axis:
    """An axis whose elements differ without regard to rows."""
    return () if size == 1 else (Factor(size),)


def same(size: Any) -> Axis:
    """An axis along which nothing changes."""
    return () if size == 1 else (Factor(size, Tag.SAME),)


def fill(shape: Iterable[Any]) -> Value:
    """A tensor of one number."""
    return Value(tuple(same(s) for s in shape))


def smoothed(axis: Axis) -> Axis:
    """The axis after something moved or combined its elements; none of them may be rows."""
    return plain(size_of(axis))


def quotient(a: Any, b: Any) -> Any:
    """a / b if that is whole for all values of the symbols, else None."""
    q = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return q if sympy.fraction(sympy.together(q))[1] == 1 else None


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same for all values of the symbols."""
    return bool(a == b or sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def _torn(factors: Iterable[Factor]) -> Stop:
    for f in factors:
        if f.order is not None:
            return Stop(MIXES, "", f.order.poison)
    return Stop(MIXES, "its pieces hold parts of several rows")


def regroup(axes: Sequence[Axis], shape: Sequence[Any]) -> tuple[Axis, ...]:
    """The axes of a view of another shape.

    Raises:
        Stop: a row would be cut.
    """
    rest = [f for axis in axes for f in axis]
    out: list[Axis] = []
    for size in reversed(shape):
        axis: Axis = ()
        left = size
        while left != 1:
            if not rest:
                raise Stop(UNDECIDED, "its shape cannot be followed")
            f = rest.pop()
            if (q := quotient(left, f.size)) is not None:
                axis, left = (f, *axis), q
            elif not f.fixed and (q := quotient(f.size, left)) is not None:
                rest.append(Factor(q, f.tag))
                axis, left = (Factor(left, f.tag), *axis), 1
            elif rest and not f.fixed and not rest[-1].fixed:
                before = rest.pop()
                tag = f.tag if f.tag is before.tag else Tag.PLAIN
                rest.append(Factor(before.size * f.size, tag))
            elif fixed := [g for g in (f, *rest[-1:]) if g.fixed]:
                raise _torn(fixed)
            else:
                raise Stop(UNDECIDED, "its shape cannot be followed")
        out.insert(0, axis)
    return tuple(out)


def join(a: Axis, b: Axis) -> Axis:
    """The axis along which elements of two tensors meet; one of size 1 meets all.

    Raises:
        Stop: different rows meet, or a row meets a number that depends on its place.
    """
    if not a or not b:
        return a or b
    left, right, out = list(a), list(b), list[Factor]()
    while left and right:
        f, g = left.pop(), right.pop()
        if not equal(f.size, g.size):
            if not f.fixed and (q := quotient(f.size, g.size)) is not None:
                left.append(Factor(q, f.tag))
                f = Factor(g.size, f.tag)
            elif not g.fixed and (q := quotient(g.size, f.size)) is not None:
                right.append(Factor(q, g.tag))
                g = Factor(f.size, g.tag)
            else:
                return (*_joined_whole([*left, f], [*right, g]), *out)
        out.insert(0, _joined(f, g))
    if left or right:
        raise Stop(UNDECIDED, "its sizes cannot be followed")
    return tuple(out)


def _joined_whole(left: list[Factor], right: list[Factor]) -> Axis:
    """Axes that are split at different places."""
    fixed = [f for f in (*left, *right) if f.fixed]
    if not fixed:
        return plain(size_of(left))
    if any(f.fixed for f in left) and any(f.fixed for f in right):
        raise _torn(fixed)
    raise Stop(UNDECIDED, "a row meets a number that depends on its place in the batch")


def _joined(f: Factor, g: Factor) -> Factor:
    if f.tag is g.tag and f.order == g.order:
        return f
    if Tag.SAME in (f.tag, g.tag):
        return g if f.tag is Tag.SAME else f
    for order in (f.order, g.order):
        if order is not None:
            raise Stop(MIXES, "", order.poison)
    raise Stop(UNDECIDED, "a row meets a number that depends on its place in the batch")


def broadcast(values: Iterable[Value], rank: int) -> tuple[Axis, ...]:
    """The axes of a pointwise result."""
    axes: list[Axis] = [()] * rank
    for value in values:
        if value.rank > rank:
            raise Stop(UNDECIDED, "its axes cannot be followed")
        for d, axis in enumerate(value.axes, start=rank - value.rank):
            axes[d] = join(axes[d], axis)
    return tuple(axes)
