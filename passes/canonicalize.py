"""One spelling for each op.

`undo_repeat_kv`: grouped-query models repeat K and V to all query heads before attention. ::

    %u = aten.unsqueeze.default(%k, 2)                 # [B, G, 1, S, D]
    %e = aten.expand.default(%u, [B, G, R, S, D])
    %c = aten.clone.default(%e)                        # R copies in memory
    %r = aten.view.default(%c, [B, G * R, S, D])
    %o = bicompile.sdpa.default(%q, %r, ...)

becomes::

    %o = bicompile.sdpa.default(%q, %k, ...)

because our attention reads head h of Q with head h // R of K: the same numbers without the copies.

`multiply_one_matrix`: see `one_matrix.py`.

`share_visible_ranges`, on a GPU: attention first finds which keys each row of its mask sees. ::

    %a = bicompile.sdpa.default(%q1, %k1, %v1, %mask, False, 0.125)
    %b = bicompile.sdpa.default(%q2, %k2, %v2, %mask, False, 0.125)

becomes::

    %r = bicompile.visible_range.default(%mask)
    %a = bicompile.sdpa_visible.default(%q1, %k1, %v1, %mask, %r, 0.125)
    %b = bicompile.sdpa_visible.default(%q2, %k2, %v2, %mask, %r, 0.125)

because the layers of a model share their mask, and so a step of decoding reads it once.  The
gradients of the layers share the ranges in the same way (`sdpa_backward_visible`).

`add_to_other_gradients`: a table of embeddings that is a matrix elsewhere has two gradients. ::

    %e = aten.embedding_dense_backward.default(%grad, %ids, 50000, -1, False)
    %g = aten.add.Tensor(%e, %other)

becomes::

    %g = aten.index_add.default(%other, 0, %ids, %grad)     # both as rows

because the rows are added to what is there: their sum is rounded once, and no table holds it alone.

`sort_stably`: where elements are equal, an unstable sort may return any order of them. ::

    %s = aten.sort.default(%x, -1, True)

becomes::

    %s = aten.sort.stable(%x, stable=True, dim=-1, descending=True)

`count_in_order`: Inductor numbers the elements of a whole tensor as they lie in memory. ::

    %i = aten.argmax.default(%x)                       # %x: [3, 5] with strides (1, 3)

becomes::

    %f = aten.reshape.default(%x, [-1])
    %i = aten.argmax.default(%f, 0)

because the position is that in the order of the axes, whatever the strides.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, value
from bicompile.passes.one_matrix import multiply_one_matrix
from bicompile.passes.repeat_kv import before_repeat
from bicompile.passes.rules.gradients import embedding_rows
from bicompile.registry import load_all

aten = torch.ops.aten
_SDPA = load_all()["sdpa"].op
_RANGE = torch.ops.bicompile.visible_range.default
_WITH_RANGES = {  # an op of attention: the position of its mask, the op that takes ranges too
    _SDPA: (3, torch.ops.bicompile.sdpa_visible.default),
    load_all()["sdpa_backward"].op: (4, torch.ops.bicompile.sdpa_backward_visible.default),
}


def canonicalize(gm: GraphModule, *, run) -> None:
    """All sub-passes in order."""
    undo_repeat_kv(gm, run=run)
    multiply_one_matrix(gm, run=run)
    share_visible_ranges(gm, run=run)
    add_to_other_gradients(gm, run=run)
    sort_stably(gm, run=run)
    count_in_order(gm, run=run)


def count_in_order(gm: GraphModule, *, run) -> None:
    """The position of an extreme value in a whole tensor is that in the order of its axes."""
    for target in (aten.argmax.default, aten.argmin.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            given = {
                **dict(zip(("self", "dim", "keepdim"), node.args, strict=False)),
                **node.kwargs,
            }
            x, dim, keep = given["self"], given.get("dim"), given.get("keepdim", False)
            if dim is not None or value(x).dim() < 2 or not run.fuel():
                continue
            emit = Emit(node)
            new = emit(target, emit(aten.reshape.default, x, [-1]), 0)
            if keep:
                new = emit(aten.reshape.default, new, [1] * value(x).dim())
            run.decide(node, "elements are counted in the order of the axes", became=str(target))
            emit.take_place(new)


def sort_stably(gm: GraphModule, *, run) -> None:
    """Equal elements keep their order."""
    for target in (aten.sort.default, aten.sort.stable):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if node.kwargs.get("stable") is not True and run.fuel():
                names = ("self", "dim", "descending")
                given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
                node.args = (given.pop("self"),)
                node.kwargs = {**given, "stable": True}
                node.target = aten.sort.stable
                run.decide(node, "equal elements keep their order", became=str(aten.sort.stable))


def add_to_other_gradients(gm: GraphModule, *, run) -> None:
    """The gradient of an embedding is added to the one that its table has elsewhere."""
    target = aten.embedding_dense_backward.default
    for node in gm.graph.find_nodes(op="call_function", target=target):
        total = next(iter(node.users)) if len(node.users) == 1 else None
        if total is None or total.target is not aten.add.Tensor or total.kwargs:
            continue
        other = total.args[0] if total.args[1] is node else total.args[1]
        if not isinstance(other, Node) or other is node or not _alike(other, node):
            continue
        if node.args[4] or not run.fuel():  # scale_grad_by_freq
            continue
        emit = Emit(total)
        index, rows = embedding_rows(emit, *node.args[:2], node.args[3])
        new = emit(aten.index_add.default, other, 0, index, rows)
        run.decide(node, "is added to the other gradient of its table", became=str(new.target))
        emit.take_place(new)
        gm.graph.erase_node(node)


def _alike(a: Node, b: Node) -> bool:
    """Whether two tensors have one shape and dtype."""
    one, two = value(a), value(b)
    return (
        isinstance(one, torch.Tensor)
        and one.dtype is two.dtype
        and len(one.shape) == len(two.shape)
        and all(statically_known_true(m == n) for m, n in zip(one.shape, two.shape, strict=True))
    )


def undo_repeat_kv(gm: GraphModule, *, run) -> None:
    """Hand K and V to attention as they were before they were repeated."""
    for node in gm.graph.find_nodes(op="call_function", target=_SDPA):
        key, val = (before_repeat(n) for n in node.args[1:3])
        same_groups = (
            key is not None and val is not None and value(key).shape[1] == value(val).shape[1]
        )
        if same_groups and run.fuel():
            node.args = (node.args[0], key, val, *node.args[3:])
            run.decide(node, "K and V are read before their repetition", became=str(_SDPA))


def share_visible_ranges(gm: GraphModule, *, run) -> None:
    """On a GPU, find what a mask shows once for all attention nodes that read it."""
    ranges: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node.target not in _WITH_RANGES:
            continue
        at, with_ranges = _WITH_RANGES[node.target]
        key, mask, is_causal = node.args[at - 2], *node.args[at : at + 2]
        if mask is None or is_causal or value(mask).device.type != "cuda":
            continue
        every_key = statically_known_true(value(mask).shape[-1] == value(key).shape[2])
        if not every_key or not run.fuel():
            continue
        if mask not in ranges:
            ranges[mask] = Emit(_after(mask))(_RANGE, mask)
        emit = Emit(node)
        new = emit(with_ranges, *node.args[: at + 1], ranges[mask], *node.args[at + 2 :])
        run.decide(node, "reads its mask's ranges from a node of their own", became=str(new.target))
        emit.take_place(new)


def _after(node: Node) -> Node:
    """The first node behind `node` that may be preceded by a call."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node
