"""Products and what follows them as one op each; no bit changes, as every rounding is repeated.

`fuse_swiglu`: the gated half of a feed-forward layer. ::

    %g = bicompile.mm.default(%x, %gate, False)
    %f = prims.convert_element_type(%g, float32)       # silu, as it is decomposed
    %n = aten.neg.default(%f)
    %e = aten.exp.default(%n)
    %a = aten.add.Tensor(%e, 1)
    %d = aten.div.Tensor(%f, %a)
    %s = prims.convert_element_type(%d, bfloat16)
    %u = bicompile.mm.default(%x, %up, False)
    %o = aten.mul.Tensor(%s, %u)

becomes::

    %o = bicompile.swiglu.default(%x, %gate, %up, False)

`fuse_qkv`: three products of one input. ::

    %q = bicompile.mm.default(%x, %wq, False)
    %k = bicompile.mm.default(%x, %wk, False)
    %v = bicompile.mm.default(%x, %wv, False)

becomes::

    %r = bicompile.qkv_proj.default(%x, %wq, %wk, %wv, None, None, None, False)
    %q, %k, %v = getitem(%r, 0), getitem(%r, 1), getitem(%r, 2)

`fuse_residual`: a product that is added to what came before. ::

    %y = bicompile.mm.default(%x, %w, False)
    %o = aten.add.Tensor(%h, %y)

becomes::

    %o = bicompile.mm_add.default(%x, %w, %h, False)

because with few rows a launch costs as much as the work, and with many a result that stays in
registers need not be read again.  No weight is copied or moved.  Views between the steps stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from operator import getitem

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, carry_origins, replace, value
from bicompile.registry import KERNELS

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def fuse_matmul(gm: GraphModule, *, run) -> None:
    """All sub-passes in order."""
    fuse_swiglu(gm, run=run)
    fuse_qkv(gm, run=run)
    fuse_residual(gm, run=run)


def fuse_swiglu(gm: GraphModule, *, run) -> None:
    """Join silu(x @ gate) * (x @ up)."""
    op = KERNELS["swiglu"].op
    for product in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        pair = _gated(product)
        if pair is None or not run.fuel():
            continue
        gate, up, views = pair
        x, weight, tf32 = gate.args
        run.decide(product, "gate, up and silu, roundings kept", became=str(op))
        emit = Emit(product)
        emit.take_place(_replay(emit, emit(op, x, weight, up.args[1], tf32), views))


def _gated(product: Node) -> tuple[Node, Node, list[Node]] | None:
    """The products behind silu(gate) * up, and the views between `up` and the result."""
    if len(product.args) != 2:
        return None
    for silu, plain in (product.args, product.args[::-1]):
        inner, uses = _before_silu(silu)
        gate, up = _behind_views(inner, uses), _behind_views(plain)
        if gate is None or up is None:
            continue
        gate, up, views = gate[0], up[0], up[1]
        same = _same_input(gate.args[0], up.args[0]) and gate.args[2] == up.args[2]
        alike = value(gate.args[1]).shape == value(up.args[1]).shape
        if same and alike and value(product).shape == value(plain).shape:
            return gate, up, views
    return None


def _before_silu(node: object) -> tuple[Node | None, int]:
    """x of `x / (1 + exp(-x))`, computed in float32 and rounded to x's dtype, and its uses."""
    rounded = _only(node, _CONVERT)
    quotient = _only(rounded.args[0] if rounded else node, aten.div.Tensor)
    if quotient is None:
        return None, 0
    wide, divisor = quotient.args
    more = _only(divisor, aten.add.Tensor)
    exponential = _only(more.args[0], aten.exp.default) if more and more.args[1:] == (1,) else None
    negative = _only(exponential.args[0], aten.neg.default) if exponential else None
    known = negative is not None and negative.args[0] is wide and len(wide.users) == 2
    if not known or value(wide).dtype is not torch.float32:
        return None, 0
    if rounded is None:
        return wide, 2
    narrow = wide.args[0] if wide.target is _CONVERT else None
    return (narrow, 1) if narrow and value(narrow).dtype is rounded.args[1] else (None, 0)


def fuse_qkv(gm: GraphModule, *, run) -> None:
    """Join three products of one input with parameters."""
    op = KERNELS["qkv_proj"].op
    for group in _projections(gm):
        if len(group) != 3 or not run.fuel():
            continue
        parts = [_parts(node) for node in group]
        emit = Emit(group[0])
        weights, biases = ([_parameter(emit, part[i]) for part in parts] for i in (1, 2))
        call = emit(op, parts[0][0], *weights, *biases, group[0].args[-1])
        carry_origins(call, *group)
        outputs = [emit(getitem, call, i) for i in range(3)]
        for node, output in zip(group, outputs, strict=True):
            run.decide(node, "three products of one input side by side", became=str(op))
            replace(node, output)


def _projections(gm: GraphModule) -> list[list[Node]]:
    """Products with parameters, grouped by what they multiply."""
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.op != "call_function" or (parts := _parts(node)) is None:
            continue
        source, *rest = parts
        if all(w is None or _is_parameter(w) for w in rest):
            groups[_source(source), str(value(source).shape), node.args[-1]].append(node)
    return list(groups.values())


def _parts(node: Node) -> tuple[Node, Node, Node | None] | None:
    """Input, weight and bias of mm, or of addmm as a Linear with bias calls it."""
    if node.target is KERNELS["mm"].op:
        return node.args[0], node.args[1], None
    if node.target is KERNELS["addmm"].op and node.args[3:5] == (1.0, 1.0):
        bias, x, weight = node.args[:3]
        return (x, weight, bias) if value(bias).dim() == 1 else None
    return None


def _is_parameter(node: Node) -> bool:
    """An input of the graph, or its transpose."""
    if node.target in (aten.permute.default, aten.t.default):
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")


def _parameter(emit: Emit, node: Node | None) -> Node | None:
    """The parameter as seen from an earlier place of the graph."""
    if node is None or node.op in ("placeholder", "get_attr"):
        return node
    return emit(node.target, *node.args, **node.kwargs)


def fuse_residual(gm: GraphModule, *, run) -> None:
    """Join a product with the tensor that it is added to."""
    op = KERNELS["mm_add"].op
    for total in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        found = next(_residuals(total), None)
        if found is None or not run.fuel():
            continue
        product, views, other = found
        x, weight, tf32 = product.args
        emit = Emit(total)
        columns = value(product).shape[1]
        flat = other if not views else emit(aten.reshape.default, other, [-1, columns])
        run.decide(total, "added where the product is, roundings kept", became=str(op))
        emit.take_place(_replay(emit, emit(op, x, weight, flat, tf32), views))


def _residuals(total: Node) -> Iterator[tuple[Node, list[Node], Node]]:
    """(product, views behind it, what it is added to)."""
    if len(total.args) != 2 or total.kwargs:
        return
    for y, other in (total.args[::-1], total.args):
        behind = _behind_views(y)
        if behind is not None and isinstance(other, Node) and _fits(other, y, behind[0]):
            yield *behind, other


def _fits(other: Node, y: Node, product: Node) -> bool:
    """Whether `other` is a dense tensor of y's shape and dtype, with a known number of columns."""
    o, val = value(other), value(y)
    return (
        isinstance(o, torch.Tensor)
        and o.dtype is val.dtype
        and _same_shape(o, val)
        and all(
            statically_known_true(o.stride(i) == o.stride(i + 1) * o.shape[i + 1])
            for i in range(o.dim() - 1)
        )
        and o.stride(-1) == 1
        and isinstance(value(product).shape[1], int)
    )


def _behind_views(node: object, uses: int = 1) -> tuple[Node, list[Node]] | None:
    """The product of which `node` is a view (or itself), used here alone; and the views."""
    views: list[Node] = []
    while isinstance(node, Node) and len(node.users) == (1 if views else uses):
        if node.target is KERNELS["mm"].op:
            return node, views[::-1]
        if node.target not in _VIEWS:
            return None
        views.append(node)
        node = node.args[0]
    return None


def _replay(emit: Emit, node: Node, views: list[Node]) -> Node:
    for view in views:
        node = emit(view.target, node, *view.args[1:])
    return node


def _only(node: object, target: object) -> Node | None:
    """The node if it calls `target` and is used once."""
    found = isinstance(node, Node) and node.target is target and len(node.users) == 1
    return node if found else None  # type: ignore[return-value]


def _same_input(a: Node, b: Node) -> bool:
    return a is b or (_source(a) is _source(b) and _same_shape(value(a), value(b)))


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(
        statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)
    )


def _source(node: Node) -> Node:
    """What a node is a view of."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node
