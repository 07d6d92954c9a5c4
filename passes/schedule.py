"""Keep the GPU kernels to one schedule where the user asked for it.

Before::

    %y = bicompile.mm.default(%x, %w, False)

with ``options={"schedules": "single"}`` becomes::

    %y = bicompile.mm.single(%x, %w, False)

because the choice has to travel with the graph: into its caches, its CUDA graphs and the thread
that runs a backward pass, whatever other models in the process asked for.  The order of summation
is the same.  Ops on the CPU have no such overload and need none.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from bicompile.graph import value
from bicompile.registry import OPS


def schedule(gm: GraphModule, *, run) -> None:
    """Take the overload `single` of each of our ops, if that is asked for."""
    if run.options.schedules != "single":
        return
    packets = [getattr(torch.ops.bicompile, name) for name in OPS]
    overloads = {packet.default: packet.single for packet in packets}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in overloads and _on_gpu(node):
            node.target = overloads[node.target]


def _on_gpu(node) -> bool:
    values = map(value, node.all_input_nodes)
    return any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for v in values)
