"""Rules of sort-and-return: rows are sorted, computed with in that order, and put back.

Mixture-of-experts layers sort their tokens by expert, multiply each run of tokens with the weight
of its expert, and put the results back.  The order depends on all rows, but the row that comes back
depends on its own numbers alone: the product's row p is that of token order(p) with the weight of
key order(p), wherever p is.
"""

from __future__ import annotations

from bicompile.independence import combining, moving
from bicompile.independence.axes import (
    MIXES,
    UNDECIDED,
    Axis,
    Content,
    Factor,
    Order,
    Stop,
    Tag,
    Value,
    equal,
    plain,
    size_of,
)
from bicompile.independence.walk import Call


def sort(call: Call) -> list[Value]:
    """Sorted elements and the order in which they stand."""
    source = call["self"]
    content = source.content
    if content is not None and content.kind == "order" and content.size == 1:
        return _inverted(call, content)
    call = call.as_numbers()
    if source.rank != 1 or not source.fixed or call.get("descending"):
        found = combining.along(call)
        d = moving.axis_number(source.rank, call["dim"])
        return [found, Value(found.axes, Content("index", size=size_of(source.axes[d])))]
    if any(f.tag is Tag.SORTED for f in source.axes[0]):
        call.combined(source.axes[0], how="sorts")
    poison = call.poison(MIXES, "it sorts the rows of the batch, and they are not put back")
    order = Order(source.axes[0], poison)
    axes = ((Factor(size_of(source.axes[0]), Tag.SORTED, order),),)
    known = content is not None and content.kind == "index"
    keys = Content("keys", order, content.size) if known and content is not None else None
    return [Value(axes, keys), Value(axes, Content("order", order, 1, poison))]


def _inverted(call: Call, content: Content) -> list[Value]:
    """The order sorted: 0, 1, 2 ..., and where each of them stood."""
    order = content.order
    if order is None or call["self"].rank != 1 or call.get("descending"):
        raise Stop("", "", content.poison)
    counted = Value((plain(size_of(order.axis)),), Content("iota"))
    return [counted, Value((order.axis,), Content("inverse", order, 1, content.poison))]


def divided(call: Call) -> Value:
    """Rounded-down quotients; of an order of several for each token, the tokens."""
    source, by = call["self"], call["other"]
    content = source.content if isinstance(source, Value) else None
    if content is None or content.kind != "order" or not isinstance(by, int) or by < 1:
        call = call.as_numbers()
        call.refuse_batch_size(*call.given.values())
        return combining.pointwise(call)
    return Value(source.axes, Content("order", content.order, content.size * by, content.poison))


def histogram(call: Call) -> Value:
    """How many keys there are of each number."""
    source = call["self"]
    content = source.content
    if content is not None and content.kind == "keys" and content.order is not None:
        bins = call["bins"]
        if bins == content.size and call["min"] == 0 and call["max"] == bins - 1:
            counts = Content("counts", content.order, bins, content.order.poison)
            return Value((plain(call.shape[0]),), counts)
    call = call.as_numbers()
    call.refuse_batch_size(*call.given.values())
    call.combined(*source.axes, how="counts")
    return Value((plain(call.shape[0]),))


def accumulated(call: Call) -> Value:
    """Running sums; of counts, where the run of each number ends."""
    source = call["self"]
    content = source.content
    if content is not None and content.kind == "counts" and source.rank == 1:
        ends = Content("ends", content.order, content.size, content.poison)
        return Value(source.axes, ends)
    call = call.as_numbers()
    call.refuse_batch_size(*call.given.values())
    return combining.along(call)


def grouped_product(call: Call) -> Value:
    """Each run of sorted rows times the matrix of its number."""
    source, weight, ends = call.tensors[:3]
    more = [call.get(n) for n in ("bias", "scale_a", "scale_b") if call.get(n) is not None]
    content = ends.content
    if content is None or content.kind != "ends" or more or source.rank != 2 or weight.rank != 3:
        call.as_numbers()
        raise Stop(UNDECIDED, "which rows meet which matrix is not known")
    run: Axis = source.axes[0]
    order = run[0].order if len(run) == 1 else None
    if order is None or order != content.order or not equal(weight.shape[0], content.size):
        raise Stop("", "", content.poison)
    call.combined(*weight.axes, source.axes[1], how="sums over")
    return Value((run, plain(call.shape[1])))
