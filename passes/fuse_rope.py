"""RMSNorm and rotary embedding of queries and keys as one op; no bit changes.

Before, for the query, and the same for the key with the same `%cos` and `%sin`::

    %n = bicompile.rms_norm.default(%q, 1, %w, 1e-06, 0.0, True)
    %p = aten.permute.default(%n, [0, 2, 1, 3])
    %a = aten.mul.Tensor(%p, %cos)
    %l = aten.slice.Tensor(%p, 3, 0, 64)
    %h = aten.slice.Tensor(%p, 3, 64, 9223372036854775807)
    %m = aten.neg.default(%h)
    %c = aten.cat.default([%m, %l], -1)
    %b = aten.mul.Tensor(%c, %sin)
    %o = aten.add.Tensor(%a, %b)

becomes::

    %r = bicompile.qk_norm_rope.default(%q, %k, %wq, %wk, %cos, %sin, 1e-06, 0.0, True)
    %oq, %ok = getitem(%r, 0), getitem(%r, 1)

because four launches over a few heads take longer than the work, and the heads are read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, carry_origins, replace, value
from bicompile.registry import load_all

aten = torch.ops.aten
KERNELS = load_all()
_LARGEST_HEAD = 1024  # a head stays in registers


@dataclass(frozen=True)
class _Rotation:
    """A normalised and rotated tensor of heads: `last` holds the result."""

    last: Node
    input: Node
    weight: Node
    cos: Node
    sin: Node
    rounding: tuple[object, ...]


def fuse_rope(gm: GraphModule, *, run) -> None:
    """Join the rotations of the query and of the key that stand together."""
    op = KERNELS["qk_norm_rope"].op
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    waiting: _Rotation | None = None
    for total in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        key = _rotation(total)
        if key is None:
            continue
        query, waiting = waiting, key
        if query is None or not _belong_together(query, key, place) or not run.fuel():
            continue
        emit = Emit(key.last)
        call = emit(
            op, query.input, key.input, query.weight, key.weight, key.cos, key.sin, *key.rounding
        )
        carry_origins(call, query.last)
        outputs = [emit(getitem, call, i) for i in range(2)]
        for old, output in zip((query.last, key.last), outputs, strict=True):
            run.decide(old, "norm and rotary embedding, roundings kept", became=str(op))
            replace(old, output)
        waiting = None


def _belong_together(query: _Rotation, key: _Rotation, place: dict[Node, int]) -> bool:
    """Whether both can be computed where the key's stands."""
    alike = (
        _same(query.cos, key.cos)
        and _same(query.sin, key.sin)
        and query.rounding == key.rounding
        and value(query.input).dtype is value(key.input).dtype
        and value(query.input).shape[3] == value(key.input).shape[3]
    )
    return alike and all(place.get(user, -1) > place[key.last] for user in query.last.users)


def _same(a: Node, b: Node) -> bool:
    """One node, or the same axis added to one node."""
    return a is b or (a.target is b.target is aten.unsqueeze.default and a.args == b.args)


def _rotation(total: Node) -> _Rotation | None:
    """The whole chain that ends in `total`, each step used by the chain alone."""
    if len(total.args) != 2 or total.kwargs:
        return None
    for left, right in (total.args, total.args[::-1]):
        plain, turned = _factors(left), _factors(right)
        if plain is None or turned is None:
            continue
        for heads, cos in (plain, plain[::-1]):
            for rotated, sin in (turned, turned[::-1]):
                norm = _norm_behind(heads)
                if norm and _is_half_turned(rotated, heads) and _are_turns(cos, sin, heads):
                    source, _, weight, *rounding = norm.args
                    return _Rotation(total, source, weight, cos, sin, tuple(rounding))
    return None


def _factors(node: object) -> tuple[Node, Node] | None:
    """Both factors of a product that is used once."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor or len(node.users) != 1:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, Node) and isinstance(b, Node) else None


def _norm_behind(heads: Node) -> Node | None:
    """The RMSNorm of [B, Q, H, D] of which `heads` is the view [B, H, Q, D]."""
    if heads.target is not aten.permute.default or heads.args[1] != [0, 2, 1, 3]:
        return None
    norm = heads.args[0]
    known = norm.target is KERNELS["rms_norm"].op and len(norm.users) == 1 and norm.args[1] == 1
    known = known and norm.args[2] is not None and len(heads.users) == 3
    size = value(heads).shape[3]
    return norm if known and isinstance(size, int) and size <= _LARGEST_HEAD else None


def _is_half_turned(rotated: Node, heads: Node) -> bool:
    """Whether `rotated` is cat(-second half, first half) of `heads`."""
    if rotated.target is not aten.cat.default or len(rotated.users) != 1:
        return False
    parts, axis = rotated.args[0], rotated.args[1] if len(rotated.args) > 1 else 0
    if len(parts) != 2 or axis not in (-1, 3):
        return False
    negative, front = parts
    if negative.target is not aten.neg.default or len(negative.users) != 1:
        return False
    size, back = value(heads).shape[3], negative.args[0]
    return _is_slice(back, heads, size // 2, size) and _is_slice(front, heads, 0, size // 2)


def _is_slice(node: Node, heads: Node, start: int, end: int) -> bool:
    if node.target is not aten.slice.Tensor or len(node.users) != 1 or len(node.args) != 4:
        return False
    source, axis, first, last = node.args
    bounds = first == start and isinstance(last, int) and min(last, value(heads).shape[3]) == end
    return source is heads and axis in (-1, 3) and bounds


def _are_turns(cos: Node, sin: Node, heads: Node) -> bool:
    """Whether cos and sin are [B or 1, 1, Q, D] in the dtype of the heads."""
    like = value(heads)

    def fits(x: object) -> bool:
        known = isinstance(x, torch.Tensor) and x.dtype is like.dtype and x.dim() == 4
        return known and all(
            statically_known_true(x.shape[i] == n)
            for i, n in ((1, 1), (2, like.shape[2]), (3, like.shape[3]))
        )

    def batch(x: torch.Tensor) -> bool:
        return statically_known_true(x.shape[0] == 1) or statically_known_true(
            x.shape[0] == like.shape[0]
        )

    return all(fits(value(x)) and batch(value(x)) for x in (cos, sin))
