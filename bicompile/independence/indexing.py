"""Rules of ops that read or write by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    join,
    plain,
    size_of,
)
from bicompile.independence.moving import axis_number
from bicompile.independence.walk import Call


def embedding(call: Call) -> Value:
    """Rows of a table."""
    table, indices = call["weight"], call["indices"]
    _check_read(call, table.axes[0], indices)
    return Value((*indices.axes, *table.axes[1:]), _ordinary(table))


def _check_read(call: Call, axis: Axis, index: Value) -> None:
    """Stop unless `index` may choose along `axis`."""
    content, fixed = index.content, [f for f in axis if f.fixed]
    if content is not None and content.poison is not None:
        if not _known(content, axis):
            raise Stop("", "", content.poison)
        return
    call.not_by_size(axis)
    for f in fixed:
        if f.order is not None:
            raise Stop("", "", f.order.poison)
    if fixed and not index.fixed and not any(map(call.depends, index.shape)):
        raise Stop(MIXES, "it takes the same rows for all")
    if fixed:
        raise Stop(UNDECIDED, "rows are chosen by numbers that are not known to be their own")


def _known(content: Content, axis: Axis) -> bool:
    """Whether the numbers choose along `axis` for each row what belongs to it."""
    if content.kind == "row":
        return len(axis) == 1 and axis[0].tag in (Tag.ROW, Tag.SAME)
    order = content.order
    if content.kind == "order" and order is not None:
        return _as_one([*axis, *plain(content.size)]) == _as_one(order.axis)
    if content.kind == "inverse":
        return len(axis) == 1 and axis[0].order is not None and axis[0].order == order
    return False


def _as_one(axis: Sequence[Factor]) -> list[tuple[Any, ...]]:
    """An axis with neighbouring factors joined that hold no rows."""
    parts: list[tuple[Any, ...]] = []
    for f in axis:
        if not f.fixed and parts and parts[-1][0] is None:
            parts[-1] = (None, parts[-1][1] * f.size, None)
        else:
            parts.append((f.tag if f.fixed else None, f.size, f.order))
    return parts


def _positions(call: Call, indices: Sequence[Any]) -> list[int]:
    positions = [i for i, v in enumerate(indices) if v is not None]
    nodes: Any = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs["indices"]
    for i in positions:
        if nodes[i].meta["val"].dtype in (torch.bool, torch.uint8):
            raise Stop(UNDECIDED, "how many elements a mask chooses is not known")
    return positions


def _layout(source: Value, indices: Sequence[Value | None]) -> tuple[list[int], tuple[Axis, ...]]:
    """Where the index axes go in the result, as the axes before them, and the index axes."""
    given = [v for v in indices if v is not None]
    together = broadcast((Value(v.axes) for v in given), max(v.rank for v in given))
    positions = [i for i, v in enumerate(indices) if v is not None]
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    rest = [i for i in range(source.rank) if i not in positions]
    place = sum(i < positions[0] for i in rest) if adjacent else 0
    return [*rest[:place], *[-1] * len(together), *rest[place:]], together


def indexed(call: Call) -> Value:
    """Elements chosen by several indices that meet."""
    source, indices = call["self"], call["indices"]
    for i in _positions(call, indices):
        _check_read(call, source.axes[i], indices[i])
    order, together = _layout(source, indices)
    chosen = iter(together)
    axes = tuple(next(chosen) if i < 0 else source.axes[i] for i in order)
    return Value(axes, _ordinary(source))


def _ordinary(source: Value) -> Content | None:
    if source.content is not None and source.content.poison is not None:
        raise Stop("", "", source.content.poison)
    return source.content if source.content and source.content.kind == "index" else None


def index_selected(call: Call) -> Value:
    """Elements chosen along one axis."""
    source, index = call["self"], call["index"]
    d = axis_number(source.rank, call["dim"])
    _check_read(call, source.axes[d], index)
    return Value((*source.axes[:d], *index.axes, *source.axes[d + 1 :]), _ordinary(source))


def _met_beside(call: Call, d: int, *tensors: Value) -> list[Axis]:
    """The axes of tensors of one rank that meet everywhere but along `d`, where none has rows."""
    call.combined(*(t.axes[d] for t in tensors), how="reads or writes along")
    axes: list[Axis] = []
    for i in range(tensors[0].rank):
        given = [t.axes[i] for t in tensors]
        if i == d or not any(f.fixed for axis in given for f in axis):
            axes.append(plain(call.shape[i]))
            continue
        met: Axis = ()
        for axis in given:
            if not equal(size_of(axis), call.shape[i]):
                raise Stop(UNDECIDED, "it takes a part of the batch")
            met = join(met, axis)
        axes.append(met)
    return axes


def gathered(call: Call) -> Value:
    """Elements chosen along an axis, for each place by an index of its own."""
    source, index = call["self"], call["index"]
    return Value(tuple(_met_beside(call, axis_number(source.rank, call["dim"]), source, index)))


def scattered(call: Call) -> Value:
    """Elements written along an axis, for each place by an index of its own."""
    source, d = call["self"], axis_number(call["self"].rank, call["dim"])
    tensors = [t for t in call.tensors if t.rank == source.rank]
    return Value(tuple(_met_beside(call, d, *tensors)))


def copied_in(call: Call) -> Value:
    """Slices written along an axis by one index."""
    source, d = call["self"], axis_number(call["self"].rank, call["dim"])
    call.no_rows(*call["index"].axes, reason=_ANYWHERE)
    slices = [t for n in ("source", "value") if isinstance(t := call.get(n), Value) and t.rank]
    return Value(tuple(_met_beside(call, d, source, *slices)))


def added_by_row(call: Call) -> Value:
    """Rows added to the rows that an index names."""
    call.no_rows(*call["index"].axes, reason=_ANYWHERE)
    return Value(tuple(_met_beside(call, 0, call["self"], call["source"])))


def part_written(call: Call) -> Value:
    """A part of one axis written."""
    source, part = call["self"], call["src"]
    d = axis_number(source.rank, call["dim"])
    if part.rank < source.rank:
        part = Value((*part.axes[:d], (), *part.axes[d:]))
    if equal(part.shape[d], source.shape[d]) and call.get("step", 1) == 1:
        return Value(broadcast([source, part], source.rank))
    call.refuse_batch_size(call.get("index"), call.get("start"), call.get("step"))
    return Value(tuple(_met_beside(call, d, source, part)))


_ANYWHERE = "rows are written to places that are not known to be their own"


def put(call: Call) -> Value:
    """Elements written by several indices that meet."""
    source, indices, values = call["self"], call["indices"], call["values"]
    if (content := _inverse(source, indices, values)) is not None:
        return Value((content.order.axis,), content)  # type: ignore[union-attr]
    call = call.as_numbers_but("indices")
    source, values = call["self"], call["values"]
    positions = _positions(call, indices)
    order, together = _layout(source, indices)
    written = [join(a, b) for a, b in zip(*_aligned(together, order, values), strict=True)]
    axes = list(source.axes)
    for i, axis in zip(order, written, strict=True):
        if i >= 0:
            axes[i] = join(axes[i], axis)
    own = [i for i in positions if _is_row_number(indices[i])]
    among = [a for i, a in zip(order, written, strict=True) if i < 0]
    if not own:
        call.no_rows(*among, reason=_ANYWHERE)
    for i in positions:
        if i in own:
            _check_read(call, axes[i], indices[i])
            (axes[i],) = [tuple(f for a in among for f in a if f.fixed)]
        else:
            call.combined(axes[i], how="writes along")
            axes[i] = plain(source.shape[i])
    return Value(tuple(axes))


def _is_row_number(index: Value) -> bool:
    return index.content is not None and index.content.kind == "row"


def _aligned(
    together: tuple[Axis, ...], order: Sequence[int], values: Value
) -> tuple[list[Axis], list[Axis]]:
    """The axes of the written place (those of the index only), and of what is written there."""
    chosen = iter(together)
    place = [next(chosen) if i < 0 else () for i in order]
    return place, [*[()] * (len(order) - values.rank), *values.axes]


def _inverse(source: Value, indices: Sequence[Any], values: Value) -> Content | None:
    """0, 1, 2 ... written by an order into memory of the same size: the inverse of the order."""
    (index, *more) = indices
    if more or index is None or index.content is None or index.content.kind != "order":
        return None
    counted = values.content is not None and values.content.kind == "iota"
    order = index.content.order
    whole = source.rank == 1 and index.content.size == 1 and order is not None
    if not (whole and counted and equal(size_of(order.axis), source.shape[0])):
        return None
    return Content("inverse", order, 1, index.content.poison)
