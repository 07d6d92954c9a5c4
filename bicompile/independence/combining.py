"""Rules of ops that compute: pointwise ones, and those that combine elements along axes."""

from __future__ import annotations

from bicompile.contract import Case
from bicompile.independence.axes import (
    UNDECIDED,
    Axis,
    Content,
    Stop,
    Value,
    broadcast,
    equal,
    join,
    plain,
    size_of,
)
from bicompile.independence.moving import axis_number
from bicompile.independence.walk import Call
from bicompile.registry import load_all


def pointwise(call: Call) -> Value:
    """Each element from the elements at its place."""
    return Value(broadcast(call.tensors, len(call.shape)))


def reduced(call: Call) -> Value:
    """Axes combined into one element."""
    if call.overload == "other":
        return pointwise(call)
    source = call["self"]
    dim = call.get("dim")
    dims = dim if isinstance(dim, (list, tuple)) else [] if dim is None else [dim]
    numbers = {axis_number(source.rank, d) for d in dims} or set(range(source.rank))
    call.combined(*(source.axes[d] for d in numbers), how="combines")
    if call.get("keepdim"):
        return Value(tuple(() if d in numbers else a for d, a in enumerate(source.axes)))
    return Value(tuple(a for d, a in enumerate(source.axes) if d not in numbers))


def along(call: Call) -> Value:
    """Each element from those along an axis, which stays."""
    rank = len(call.shape)
    d = axis_number(rank, call.get("dim", -1))
    call.combined(*(t.axes[d] for t in call.tensors if t.rank == rank), how="runs along")
    axes = broadcast((Value((*t.axes[:d], (), *t.axes[d + 1 :])) for t in call.tensors), rank)
    return Value((*axes[:d], plain(call.shape[d]), *axes[d + 1 :]))


def statistics(call: Call) -> list[Value]:
    """Numbers of all elements along an axis, which stays with one."""
    source = call["self"]
    d = axis_number(source.rank, call["dim"])
    call.combined(source.axes[d], how="combines")
    return [Value((*source.axes[:d], (), *source.axes[d + 1 :]))] * len(call.shapes)


def chosen_along(call: Call) -> list[Value]:
    """The largest elements along an axis, and their numbers."""
    source = call["self"]
    d = axis_number(source.rank, call["dim"])
    found = along(call)
    return [found, Value(found.axes, Content("index", size=size_of(source.axes[d])))]


def normalised(call: Call) -> list[Value]:
    """Each element from all along the last axes; statistics of these."""
    source, given = call["input"], call.get("normalized_shape")
    count = call["normalized_ndim"] if given is None else len(given)
    call.combined(*source.axes[source.rank - count :], how="normalises over")
    out = Value(broadcast(call.tensors, source.rank))
    stats = Value((*source.axes[: source.rank - count], *[()] * count))
    return [out, *[stats] * (len(call.shapes) - 1)]


def group_norm(call: Call) -> list[Value]:
    """Each sample by itself; its channels and positions are combined."""
    call = call.as_numbers()
    call.refuse_batch_size(*(call.get(n) for n in ("group", "num_groups", "groups")))
    source = call["input"]
    call.combined(*source.axes[1:], *(_axes(call, "weight", "bias")), how="normalises over")
    stats = Value((source.axes[0], plain(call.shapes[1][1]))) if len(call.shapes) > 1 else source
    return [source, *[stats] * (len(call.shapes) - 1)]


def _axes(call: Call, *names: str) -> list[Axis]:
    return [axis for n in names if call.get(n) is not None for axis in call[n].axes]


_ALWAYS_TRAINING = ("_batch_norm_with_update_functional",)


def batch_norm(call: Call) -> list[Value]:
    """Each channel by its statistics: over all else in training, given ones otherwise."""
    source = call["input"]
    channel = source.axes[1]
    if call.get("training", call.name in _ALWAYS_TRAINING):
        others = (*source.axes[:1], *source.axes[2:])
        call.combined(*others, how="takes its statistics over")
    for axis in _axes(call, "weight", "bias", "running_mean", "running_var"):
        channel = join(channel, axis)
    out = Value((source.axes[0], channel, *source.axes[2:]))
    channels = size_of(channel)
    shapes = call.shapes[1:]
    stats = [Value((channel,)) if equal(s[0], channels) else Value((plain(s[0]),)) for s in shapes]
    return [out, *stats]


# ------------------------------------------------------------------------------------- products

_CASES: dict[str, tuple[Case, ...]] = {
    name: kernel.contract.cases
    for name, kernel in load_all().items()
    if kernel.family in ("matmul", "rope")
} | {
    "mv": (Case("self: M K, vec: K -> M"),),
    "dot": (Case("self: K, tensor: K ->"),),
    "vdot": (Case("self: K, other: K ->"),),
    "addmv": (Case("self: M, mat: M K, vec: K -> M"),),
    "addbmm": (Case("self: M N, batch1: B M K, batch2: B K N -> M N"),),
}


def by_letters(call: Call) -> Value | list[Value]:
    """Axes of one letter meet; a letter that is in no result is summed over."""
    case = max(_CASES[call.name], key=lambda c: len(c.inputs[0].axes))
    met: dict[str, Axis] = {}
    for arg in case.inputs:
        if (value := call.get(arg.name)) is None:
            continue
        for letter, axis in zip(arg.axes[len(arg.axes) - value.rank :], value.axes, strict=True):
            met[letter] = join(met.get(letter, ()), axis)
    kept = {letter for out in case.outputs for letter in out}
    call.combined(*(met[a] for a in met if a not in kept), how="sums over")
    outputs = [Value(tuple(met[a] for a in out)) for out in case.outputs]
    return outputs[0] if len(outputs) == 1 else outputs


def solved(call: Call) -> Value:
    """Each column of the right side by itself; all of its matrix is combined."""
    matrix, right = call["A"], call["B"]
    call.combined(*matrix.axes[1:], right.axes[1], how="solves over")
    return Value((join(matrix.axes[0], right.axes[0]), plain(call.shape[1]), right.axes[2]))


def heads(call: Call) -> list[Value]:
    """Heads of queries and of keys: each is normalised and turned by itself."""
    outputs = by_letters(call)
    call.combined(call["query"].axes[-1], call["key"].axes[-1], how="normalises over")
    return outputs  # type: ignore[return-value]


def linear(call: Call) -> Value:
    """`input @ weight.T + bias`."""
    source, weight = call["input"], call["weight"]
    call.combined(join(source.axes[-1], weight.axes[-1]), how="sums over")
    columns = weight.axes[:-1]
    for axis in _axes(call, "bias"):
        columns = (join(columns[0], axis),)
    return Value((*source.axes[:-1], *columns))


_HIDDEN = ("attn_mask", "attn_bias")


def attention(call: Call) -> list[Value]:
    """Queries meet the keys of their own batch entry and head."""
    if call.get("dropout_p"):
        raise Stop(UNDECIDED, "it draws random numbers by place")
    query, key, value = (call[n] for n in ("query", "key", "value"))
    lead = [
        join(_heads(q, k), v if equal(size_of(v), size_of(q)) else _heads(q, v))
        for q, k, v in zip(query.axes[:-2], key.axes[:-2], value.axes[:-2], strict=True)
    ]
    queries, keys = query.axes[-2], join(key.axes[-2], value.axes[-2])
    added = [call[n] for n in _HIDDEN if call.get(n) is not None]
    if call.get("sinks") is not None:
        added.append(Value((*call["sinks"].axes, (), ())))
    if added:
        *lead, queries, keys = broadcast([Value((*lead, queries, keys)), *added], query.rank)
    call.combined(keys, join(query.axes[-1], key.axes[-1]), how="attends over")
    if call.get("is_causal") and any(f.fixed for f in queries):
        raise Stop(UNDECIDED, "a row meets a number that depends on its place in the batch")
    out = Value((*lead, queries, value.axes[-1]))
    stats = Value((*lead, queries))
    if any(len(s) not in (out.rank, stats.rank) for s in call.shapes):
        raise Stop(UNDECIDED, "its results cannot be followed")
    return [out if len(s) == out.rank else stats for s in call.shapes]


def attention_gradients(call: Call) -> list[Value]:
    """The queries of a batch entry and head meet its keys, and these meet all of its queries."""
    query, key, value, grad = (call[n] for n in ("query", "key", "value", "grad"))
    lead = [
        join(join(_heads(q, k), _heads(q, v)), g)
        for q, k, v, g in zip(*(t.axes[:-2] for t in (query, key, value, grad)), strict=True)
    ]
    queries, keys = query.axes[-2], join(key.axes[-2], value.axes[-2])
    mask = call.get("attn_mask")
    if mask is not None:
        *lead, queries, keys = broadcast([Value((*lead, queries, keys)), mask], query.rank)
    call.combined(queries, keys, query.axes[-1], value.axes[-1], how="attends over")
    return [Value((lead[0], *map(plain, shape[1:]))) for shape in call.shapes]


def visible_range(call: Call) -> list[Value]:
    """What a mask shows: one number of a row counts all rows and heads of its batch entry."""
    mask = call["attn_mask"]
    call.combined(*mask.axes[-3:], how="finds the visible keys over")
    lead = mask.axes[0] if mask.rank == 4 else ()
    return [Value((lead, *map(plain, call.shape[1:])))]


def _heads(query: Axis, key: Axis) -> Axis:
    """An axis of both; of several query heads that share a head of the keys, that of the queries.

    Behind the rows the heads of a row stay in it: head h of the queries reads h // R of the keys.
    """
    if equal(size_of(query), size_of(key)) or not query or not key:
        return join(query, key)
    rows = [axis[:1] for axis in (query, key) if axis[0].fixed]
    rest = [f for axis in (query, key) for f in (axis[1:] if rows else axis)]
    if any(f.fixed for f in rest) or len(rows) == 1:
        raise Stop(UNDECIDED, "its heads cannot be followed")
    if rows:
        join(*rows)
    return query


def spatial(call: Call) -> list[Value]:
    """Each sample by itself; what slides over its channels and positions."""
    source = call.tensors[0]
    others = [axis for t in call.tensors[1:] for axis in t.axes]
    call.combined(*source.axes[2:], *others, how="slides over")
    convolution = call.name.startswith("conv")
    if convolution and call["groups"] == 1:
        call.combined(source.axes[1], how="sums over")
    call.no_rows(source.axes[1], reason="rows lie among its channels")
    if source.rank != (call["weight"].rank if convolution else len(call.shape)):
        raise Stop(UNDECIDED, "its axes cannot be followed")
    if call.name.startswith("pixel") and source.rank != 4:
        raise Stop(UNDECIDED, "its axes cannot be followed")
    return [Value((source.axes[0], *map(plain, shape[1:]))) for shape in call.shapes]
