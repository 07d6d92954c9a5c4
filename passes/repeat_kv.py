"""Gradients of K and V in a grouped-query model: those of the heads before they were repeated.

Before, with R heads of Q that share one of K and V::

    %r = aten.view.default(%c, [B, G * R, S, D])             # repeats %k; %s repeats %v
    %d = bicompile.sdpa_backward.default(%grad, %q, %r, %s, ...)
    %1 = operator.getitem(%d, 1)
    %w = aten.view.default(%1, [B, G, R, S, D])
    %g = aten.sum.dim_IntList(%w, [2], True)

becomes::

    %d = bicompile.sdpa_backward.default(%grad, %q, %k, %v, ...)
    %1 = operator.getitem(%d, 1)
    %g = aten.unsqueeze.default(%1, 2)

because the op adds up the heads of a group itself and rounds their sum once, and because K and V
are then kept for the gradient, not R copies of them.  It runs over forward and backward together,
where both the repetition and its sums can be seen; `canonicalize` does the same in the forward.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, value
from bicompile.registry import load_all

aten = torch.ops.aten
_SDPA_BACKWARD = load_all()["sdpa_backward"].op
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def undo_repeat_kv_of_gradients(graph: Graph) -> None:
    """Take the gradients of K and V as they were before they were repeated."""
    for node in list(graph.find_nodes(op="call_function", target=_SDPA_BACKWARD)):
        grad, query, *repeated = node.args[:4]
        before = [before_repeat(n) for n in repeated]
        found = {user.args[1]: user for user in node.users}
        if before[0] is None or before[1] is None or not _same(before[0], before[1], (1,)):
            continue
        sums = {i: _sum_of_heads(found[i], before[i - 1]) for i in (1, 2) if i in found}
        if None in sums.values():
            continue
        emit = Emit(node)
        new = emit(_SDPA_BACKWARD, grad, query, *before, *node.args[4:])
        for i, old in found.items():
            part = emit(operator.getitem, new, i)
            if i in sums:
                old = sums[i]
                if value(old).dim() == 5:
                    part = emit(aten.unsqueeze.default, part, 2)
            old.replace_all_uses_with(part)
        graph.eliminate_dead_code()


def before_repeat(node: Node) -> Node | None:
    """The tensor that `node` repeats along axis 1, each head R times in a row, or None."""
    n = node
    if n.target not in _VIEWS:
        return None
    n = n.args[0]
    if n.target is aten.clone.default:
        n = n.args[0]
    if n.target is not aten.expand.default:
        return None
    n = n.args[0]
    if n.target is not aten.unsqueeze.default or n.args[1] != 2:
        return None
    source = n.args[0]
    four = value(source).dim() == value(node).dim() == 4
    return source if four and _same(source, node, (0, 2, 3)) else None


def _same(a: Node, b: Node, axes: tuple[int, ...]) -> bool:
    """Whether two tensors have the same sizes along these axes."""
    return all(statically_known_true(value(a).shape[i] == value(b).shape[i]) for i in axes)


def _sum_of_heads(gradient: Node, source: Node) -> Node | None:
    """The node that adds up the heads of each group, if it alone reads them."""
    view = _only(gradient)
    total = _only(view) if view is not None and view.target in _VIEWS else None
    if total is None or total.target is not aten.sum.dim_IntList or total.kwargs:
        return None
    grouped, shape = value(view).shape, value(source).shape
    alike = len(grouped) == 5 and all(
        statically_known_true(a == b) for a, b in zip(grouped[:2] + grouped[3:], shape, strict=True)
    )
    return total if alike and list(total.args[1]) == [2] else None


def _only(node: Node) -> Node | None:
    """The one node that reads another, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
