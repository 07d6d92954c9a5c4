"""Fusions into wider ops of ours that change no bit.

Those of products are in `fuse_matmul`, those of rotary embeddings in `fuse_rope`, that of gradients
of a loss in `fuse_one_hot`, that of counters in `fuse_counters`.

`fuse_rms_norm`: transformers write RMSNorm by hand. ::

    %f = prims.convert_element_type(%x, float32)
    %p = aten.pow.Tensor_Scalar(%f, 2)
    %m = bicompile.mean.default(%p, [2], True, float32)
    %a = aten.add.Tensor(%m, 1e-06)
    %r = aten.rsqrt.default(%a)
    %y = aten.mul.Tensor(%f, %r)
    %h = prims.convert_element_type(%y, bfloat16)
    %o = aten.mul.Tensor(%w, %h)

becomes::

    %o = bicompile.rms_norm.default(%x, 1, %w, 1e-06, 0.0, True)

because eight nodes around one reduction are three kernels, and the fused kernel repeats every
rounding of the chain.  Also without the casts (fp32), without a weight, and with ``1 + w`` before
(Gemma) or after the rounding to the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.graph import Emit, value
from bicompile.passes.fuse_counters import fuse_counters
from bicompile.passes.fuse_matmul import fuse_matmul
from bicompile.passes.fuse_one_hot import fuse_one_hot
from bicompile.passes.fuse_rope import fuse_rope
from bicompile.registry import KERNELS

aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_MUL = aten.mul.Tensor
_ADD = (aten.add.Tensor, aten.add.Scalar)


def fuse(gm: GraphModule, *, run) -> None:
    """All sub-passes in order."""
    fuse_rms_norm(gm, run=run)
    fuse_matmul(gm, run=run)
    fuse_rope(gm, run=run)
    fuse_one_hot(gm, run=run)
    fuse_counters(gm, run=run)


@dataclass(frozen=True)
class _Chain:
    """A matched RMSNorm: `last` holds its result."""

    last: Node
    input: Node
    normalized_ndim: int
    eps: float
    weight: Node | None = None
    offset: float = 0.0
    round_first: bool = True


def fuse_rms_norm(gm: GraphModule, *, run) -> None:
    """Replace hand-written RMSNorm chains by one op."""
    kernel = KERNELS["rms_norm"]
    for mean in gm.graph.find_nodes(op="call_function", target=KERNELS["mean"].op):
        chain = _match(mean)
        if chain is None or not run.fuel():
            continue
        emit = Emit(chain.last)
        new = emit(
            kernel.op,
            chain.input,
            chain.normalized_ndim,
            chain.weight,
            chain.eps,
            chain.offset,
            chain.round_first,
        )
        run.decide(chain.last, "hand-written RMSNorm, roundings kept", became=str(kernel.op))
        emit.take_place(new)


def _match(mean: Node) -> _Chain | None:
    squares, dim, keepdim, _ = mean.args
    wide = _squared(squares)
    if wide is None or not keepdim or value(wide).dtype is not torch.float32:
        return None
    rank = value(wide).dim()
    if not dim or dim != list(range(rank - len(dim), rank)):
        return None
    plus_eps = _only_user(mean, *_ADD)
    rsqrt = plus_eps and _only_user(plus_eps, aten.rsqrt.default)
    scaled = rsqrt and _only_user(rsqrt, _MUL)
    if not scaled or not isinstance(plus_eps.args[1], float) or plus_eps.kwargs:
        return None
    source = wide.args[0] if wide.target is _CONVERT else wide
    if value(source).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        source = wide
    if _other(scaled, rsqrt) not in (wide, source):
        return None
    head = _Chain(scaled, source, len(dim), plus_eps.args[1])
    return _with_weight(head)


def _with_weight(head: _Chain) -> _Chain | None:
    """Extend the chain over the rounding to the input's dtype and the product with a weight."""
    scaled, dtype = head.last, value(head.input).dtype
    if dtype is torch.float32:
        return _weighted(head, scaled) or head
    rounded = _only_user(scaled, _CONVERT)
    if rounded is not None:
        if rounded.args[1] is not dtype:
            return None
        done = _Chain(rounded, head.input, head.normalized_ndim, head.eps)
        return _weighted(done, rounded) or done
    weighted = _weighted(head, scaled, widened=True)
    last = weighted and _only_user(weighted.last, _CONVERT)
    if not last or last.args[1] is not dtype:
        return None
    return _Chain(
        last, head.input, head.normalized_ndim, head.eps, weighted.weight, weighted.offset, False
    )


def _weighted(head: _Chain, product_of: Node, widened: bool = False) -> _Chain | None:
    product = _only_user(product_of, _MUL)
    if product is None or value(product).dtype is not value(product_of).dtype:
        return None
    factor, offset = _other(product, product_of), 0.0
    if isinstance(factor, Node) and factor.target in _ADD and not factor.kwargs:
        left, right = factor.args
        if isinstance(right, (int, float)) and not isinstance(left, (int, float)):
            factor, offset = left, float(right)
    if widened and isinstance(factor, Node) and factor.target is _CONVERT:
        factor = factor.args[0]
    if not isinstance(factor, Node) or not _is_weight(factor, head):
        return None
    return _Chain(product, head.input, head.normalized_ndim, head.eps, factor, offset)


def _is_weight(factor: Node, head: _Chain) -> bool:
    """A tensor over exactly the normalised axes, in the input's dtype."""
    w, x = value(factor), value(head.input)
    return (
        isinstance(w, torch.Tensor)
        and w.dtype is x.dtype
        and w.dim() == head.normalized_ndim
        and all(
            statically_known_true(a == b) for a, b in zip(w.shape, x.shape[-w.dim() :], strict=True)
        )
    )


def _squared(node: Node) -> Node | None:
    """x of `x ** 2` or `x * x`, if nobody else uses the square."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0]
    if node.target is _MUL and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _only_user(node: Node, *targets: object) -> Node | None:
    """The single user of a node if it calls one of `targets`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _other(product: Node, factor: Node) -> object:
    left, right = product.args
    return right if left is factor else left
