"""Rules of ops that move, repeat or make elements without computing with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from bicompile.independence.axes import (
    MIXES,
    UNDECIDED,
    Axis,
    Content,
    Factor,
    Stop,
    Tag,
    Value,
    broadcast,
    equal,
    fill,
    join,
    plain,
    quotient,
    regroup,
    same,
    size_of,
    smoothed,
)
from bicompile.independence.walk import Call

_WHOLE = ("iota", "counts", "ends", "keys", "empty")
_WIDE = (torch.int32, torch.int64)


def _source(call: Call) -> Value:
    return next(iter(call.tensors))


def axis_number(rank: int, dim: Any) -> int:
    """A dimension counted from the front."""
    return int(dim) % max(rank, 1)


def _kept(content: Content | None, moved: bool = True) -> Content | None:
    """What the numbers still are after their tensor was `moved`, so that places changed."""
    if content is None or not moved or content.kind not in _WHOLE or content.kind == "empty":
        return content
    if content.poison is not None:
        raise Stop("", "", content.poison)
    return None


def copied(call: Call) -> Value:
    """The same numbers, perhaps in another dtype."""
    source, dtype = _source(call), call.dtypes[0]
    content = source.content
    exact = dtype in _WIDE or (content is not None and content.kind == "keys" and _small(call))
    if content is None or exact or content.kind == "empty":
        return source
    if content.poison is not None:
        raise Stop("", "", content.poison)
    return Value(source.axes)


def _small(call: Call) -> bool:
    """Whether float32 and wider hold the keys exactly."""
    size = _source(call).content.size  # type: ignore[union-attr]
    return call.dtypes[0] in (torch.float32, torch.float64) and bool(size <= 2**24)


def viewed(call: Call) -> Value:
    """Another shape over the same elements in the same order."""
    if call.overload == "dtype":
        raise Stop(UNDECIDED, "it reads the bits in another dtype")
    source = _source(call)
    moved = len(call.shape) != source.rank
    return Value(regroup(source.axes, call.shape), _kept(source.content, moved))


def expanded(call: Call) -> Value:
    """Axes of size 1 repeated."""
    source = _source(call)
    axes = [same(s) for s in call.shape]
    for d, axis in enumerate(source.axes, start=len(axes) - source.rank):
        if axis or call.shape[d] == 1:
            axes[d] = axis
    return Value(tuple(axes), _kept(source.content))


def permuted(call: Call) -> Value:
    """Axes in another order."""
    source = _source(call)
    dims = [axis_number(source.rank, d) for d in call["dims"]]
    return Value(tuple(source.axes[d] for d in dims), _kept(source.content))


def transposed(call: Call) -> Value:
    """Two axes exchanged."""
    source = _source(call)
    axes = list(source.axes)
    if source.rank > 1:
        first = axis_number(source.rank, call.get("dim0", 0))
        second = axis_number(source.rank, call.get("dim1", 1))
        axes[first], axes[second] = axes[second], axes[first]
    return Value(tuple(axes), _kept(source.content))


def _part(call: Call, axis: Axis, start: Any, size: Any, step: Any = 1) -> Axis:
    """`size` elements of an axis from `start` on."""
    if equal(size, size_of(axis)) and step == 1:
        return axis
    call.not_by_size(axis)
    place = next((i for i, f in enumerate(axis) if f.fixed), None)
    if place is None:
        call.refuse_batch_size(start, step)
        return same(size) if all(f.tag is Tag.SAME for f in axis) else plain(size)
    if (order := axis[place].order) is not None:
        raise Stop("", "", order.poison)
    block = size_of(axis[place:])
    count = quotient(size, block)
    if step == 1 and count is not None and quotient(start, block) is not None:
        return (*plain(count), *axis[place:])
    if isinstance(start, (int, sympy.Integer)) and (start != 0 or step != 1):
        raise Stop(MIXES, "it moves rows to other places in the batch")
    raise Stop(UNDECIDED, "it takes a part of the batch")


def sliced(call: Call) -> Value:
    """A part of one axis."""
    source = _source(call)
    d = axis_number(source.rank, call["dim"])
    start = call["start"] if call["start"] is not None else 0
    axes = list(source.axes)
    axes[d] = _part(call, axes[d], start, call.shape[d], call.get("step", 1))
    whole = equal(call.shape[d], size_of(source.axes[d]))
    return Value(tuple(axes), _kept(source.content, not whole))


def selected(call: Call) -> Value:
    """One place of an axis."""
    source = _source(call)
    d = axis_number(source.rank, call["dim"])
    call.not_by_size(source.axes[d])
    call.refuse_batch_size(call.get("index"))
    for f in source.axes[d]:
        if f.order is not None:
            raise Stop("", "", f.order.poison)
        if f.fixed:
            raise Stop(MIXES, "it takes one row for all")
    return Value(source.axes[:d] + source.axes[d + 1 :], _kept(source.content))


def unbound(call: Call) -> list[Value]:
    """Each place of an axis as a result of its own."""
    return [selected(call)] * len(call.shapes)


def split(call: Call) -> list[Value]:
    """An axis in several parts."""
    source = _source(call)
    d = axis_number(source.rank, call["dim"])
    start, parts = sympy.Integer(0), []
    for shape in call.shapes:
        axes = list(source.axes)
        axes[d] = _part(call, axes[d], start, shape[d])
        parts.append(Value(tuple(axes), _kept(source.content)))
        start += shape[d]
    return parts


def repeated(call: Call) -> Value:
    """Axes several times in a row."""
    source, repeats = _source(call), call["repeats"]
    axes = [same(r) for r in repeats]
    for d, axis in enumerate(source.axes, start=len(axes) - source.rank):
        axes[d] = (*axes[d], *axis)
    return Value(tuple(axes), _kept(source.content))


def created(call: Call) -> Value:
    """A tensor of one number, or of none yet."""
    call.refuse_batch_size(call.get("fill_value"), call.get("s"))
    value = fill(call.shape)
    if not call.name.removeprefix("new_").startswith("empty"):
        return value
    poison = call.poison(UNDECIDED, "its memory is read before it is written")
    return replace(value, content=Content("empty", poison=poison))


def counted(call: Call) -> Value:
    """0, 1, 2 ..., the rows' own numbers if there are as many as rows."""
    start, step = call.get("start", 0), call.get("step", 1)
    call.refuse_batch_size(start, step)
    (size,) = call.shape
    whole = start == 0 and step == 1 and call.dtypes[0] in _WIDE
    if whole and size in call.batch:
        poison = call.poison(UNDECIDED, "the row's number in the batch is used as a number")
        return Value(((Factor(size, Tag.ROW),),), Content("row", poison=poison))
    return Value((plain(size),), Content("iota") if whole else None)


def constant(call: Call) -> Value:
    """Numbers that depend on their places alone."""
    return Value(tuple(plain(s) for s in call.shape))


def concatenated(call: Call) -> Value:
    """Tensors side by side along an axis."""
    rank = len(call.shape)
    parts = [t for t in call["tensors"] if t.rank == rank]
    d = axis_number(rank, call["dim"])
    others = [Value((*t.axes[:d], (), *t.axes[d + 1 :])) for t in parts]
    axes = list(broadcast(others, rank))
    along = [t.axes[d] for t in parts]
    if len(along) == 1:
        axes[d] = along[0]
    elif not any(f.fixed for axis in along for f in axis):
        axes[d] = plain(call.shape[d])
    elif all(equal(size_of(a), size_of(along[0])) for a in along):
        joined: Axis = ()
        for axis in along:
            joined = join(joined, axis)
        axes[d] = (*plain(len(along)), *joined)
    else:
        raise Stop(UNDECIDED, "rows and what are no rows stand along one axis")
    return Value(tuple(axes))


def stacked(call: Call) -> Value:
    """Tensors along a new axis."""
    rank = len(call.shape)
    d = axis_number(rank, call["dim"])
    axes = broadcast(call["tensors"], rank - 1)
    return Value((*axes[:d], plain(len(call["tensors"])), *axes[d:]))


def padded(call: Call) -> Value:
    """Constants before and behind the elements of the last axes."""
    source, pad = _source(call), call["pad"]
    axes = list(source.axes)
    for d in range(len(axes)):
        before = 2 * (len(axes) - 1 - d)
        if not any(pad[before : before + 2]):
            continue
        if any(f.fixed for f in axes[d]):
            raise Stop(UNDECIDED, "it adds to the batch")
        axes[d] = plain(call.shape[d])
    return Value(tuple(axes))


def moved_along(call: Call) -> Value:
    """Elements at other places of the same axes."""
    source = _source(call)
    dims = [axis_number(source.rank, d) for d in call["dims"]] or range(source.rank)
    axes = list(source.axes)
    for d in dims:
        for f in axes[d]:
            if f.order is not None:
                raise Stop("", "", f.order.poison)
            if f.fixed:
                raise Stop(MIXES, "it moves rows to other places in the batch")
        axes[d] = smoothed(axes[d])
    return Value(tuple(axes))


def triangle(call: Call) -> Value:
    """Zeros on one side of the diagonal of the last two axes."""
    source = _source(call)
    if any(f.fixed for axis in source.axes[-2:] for f in axis):
        raise Stop(UNDECIDED, "a row meets a number that depends on its place in the batch")
    return Value((*source.axes[:-2], *(smoothed(a) for a in source.axes[-2:])))
