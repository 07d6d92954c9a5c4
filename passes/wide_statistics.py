"""The statistics of a norm of half types stay in float32 on their way to the gradient.

On a CPU PyTorch's graphs round them to the type of the input, which costs a gradient accuracy that
its kernels do not lose under autocast. Before::

    %n = aten.native_layer_norm.default(%x, [64], %w, %b, 1e-05)  # bfloat16
    %y = %n[0]
    %dx = aten.native_layer_norm_backward.default(%g, %x, [64], %n[1], %n[2], %w, %b, ...)

becomes::

    %f = prims.convert_element_type(%x, float32)
    %n = aten.native_layer_norm.default(%f, [64], %w, %b, 1e-05)  # float32
    %y = prims.convert_element_type(%n[0], bfloat16)
    %dx = aten.native_layer_norm_backward.default(%g, %x, [64], %n[1], %n[2], %w, %b, ...)

The norm computes in float32 and rounds once in both, so no bit of its result changes. It runs over
forward and backward together.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from bicompile.graph import Emit, value
from bicompile.passes.rules.common import as_dtype, aten

NORMS = (aten.native_layer_norm.default, aten.native_group_norm.default)


def wide_statistics(graph: Graph) -> None:
    """Widen the inputs of norms whose statistics are read in half precision."""
    for norm in NORMS:
        for node in graph.find_nodes(op="call_function", target=norm):
            if any(u.args[1] > 0 and value(u).dtype.itemsize == 2 for u in node.users):
                _widen(node)


def _widen(node: Node) -> None:
    emit, dtype = Emit(node), value(node)[0].dtype
    args = (
        as_dtype(emit, a, torch.float32) if isinstance(value(a), torch.Tensor) else a
        for a in node.args
    )
    call = emit(node.target, *args)
    y, *statistics = (emit(operator.getitem, call, i) for i in range(3))
    emit.take_place((as_dtype(emit, y, dtype), *statistics))
