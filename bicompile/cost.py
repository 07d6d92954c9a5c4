"""What a node of a graph costs: floating-point operations and bytes, from shapes alone.

Symbolic sizes count by the example that they were traced with.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from bicompile.graph import hint, value
from bicompile.passes.audit import ALLOWED

aten = torch.ops.aten
_SAME_WORK = {
    "bicompile::mm": aten.mm,
    "bicompile::bmm": aten.bmm,
    "bicompile::addmm": aten.addmm,
    "bicompile::baddbmm": aten.baddbmm,
}
"""Our op -> the op of PyTorch whose formula counts its work."""


def flop(node: Node) -> int:
    """Floating-point operations by the formulas of `torch.utils.flop_counter`; 0 without one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    name = node.target._schema.name
    if name in ("bicompile::sdpa", "bicompile::sdpa_visible"):
        return _attention(node)
    formula = flop_registry.get(_SAME_WORK.get(name, node.target.overloadpacket))
    if formula is None:
        return 0
    args, kwargs = tree_map(_shape, (node.args, node.kwargs))
    if name in _SAME_WORK:  # behind the tensors come arguments of ours
        args = [a for a in args if isinstance(a, tuple)]
    return int(formula(*args, **kwargs, out_val=_shape(node)))


def _attention(node: Node) -> int:
    """Both products; every query meets every key, as in the formulas of PyTorch's own kernels."""
    query, key, val = (_shape(n) for n in node.args[:3])
    batch, heads, rows, _ = query
    product = flop_registry[aten.bmm]
    total = 0
    for inner, outer in ((key[3], key[2]), (key[2], val[3])):
        left, right = (batch * heads, rows, inner), (batch * heads, inner, outer)
        total += product(left, right, out_val=None)
    return int(total)


def _shape(x: Any) -> Any:
    x = value(x) if not isinstance(x, Node) or "val" in x.meta else None
    return tuple(hint(s) for s in x.shape) if isinstance(x, torch.Tensor) else x


def moved_bytes(node: Node) -> int:
    """Bytes of the tensors that a node reads and writes by itself, before any fusion.

    A view moves nothing, nor does a node that picks one of several results; a gather reads of its
    table what it returns.
    """
    if node.target is getitem or _is_view(node):
        return 0
    sources = node.all_input_nodes
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
        sources = [node, *sources[1:]] if name in ALLOWED["gather"][1] else sources
    tensors = [n.meta.get("val") for n in (node, *sources)]
    return sum(_size(t) for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def _is_view(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    aliases = any(r.alias_info is not None for r in target._schema.returns)
    return aliases or target in (aten._unsafe_view.default, aten.reshape.default)


def _size(tensor: torch.Tensor) -> int:
    total = tensor.element_size()
    for size in tensor.shape:
        total *= hint(size)
    return total
