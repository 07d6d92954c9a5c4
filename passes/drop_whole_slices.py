"""Slices that are all of their tensor.

Before, in a graph with sizes that vary::

    %s = aten.slice.Tensor(%x, 0, 0, 9223372036854775807)
    %w = aten.slice_scatter.default(%zeros, %g, 0, 0, 9223372036854775807)

becomes `%x` and `%g` where they were read.  Where sizes are fixed, tracing leaves them out itself;
Inductor does so in forward and backward, but only after they were cut apart, and the passes over
both (see `repeat_kv`) would meet them between the ops that they look for.
"""

from __future__ import annotations

import sys

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
_DEFAULTS = (0, None, None, 1)  # dim, start, end, step


def drop_whole_slices(graph: Graph) -> None:
    """Read what is sliced, and what is written into a slice, where the slice is the whole."""
    for target, operands in ((aten.slice.Tensor, 1), (aten.slice_scatter.default, 2)):
        for node in list(graph.find_nodes(op="call_function", target=target)):
            given = node.args[operands:]
            if not node.kwargs and _is_whole(*given, *_DEFAULTS[len(given) :]):
                node.replace_all_uses_with(_operand(node, operands - 1))
                graph.erase_node(node)


def _is_whole(dim: int, start: object, end: object, step: object) -> bool:
    return start in (0, None) and step == 1 and (end is None or end == sys.maxsize)


def _operand(node: Node, i: int) -> Node:
    found = node.args[i]
    assert isinstance(found, Node)
    return found
