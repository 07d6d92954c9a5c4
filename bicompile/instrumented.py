"""Graphs whose intermediate values can be seen: run node by node, or returned as results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node


class Watcher(Interpreter):
    """Runs a graph node by node and keeps the values of some."""

    def __init__(self, gm: GraphModule, wanted: set[Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.seen: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result
        return result


def compiled(model: torch.nn.Module, program: object) -> Callable[..., Any]:
    """A model as one of the programs runs it."""
    if program == "eager":
        return model
    torch.compiler.reset()  # or a graph of another batch size would be taken
    backend = "inductor" if program == "inductor" else "batch_invariant"
    return torch.compile(model, backend=backend)


def with_results(gm: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """A copy of a graph that returns (values of nodes, results)."""
    copies: dict[Node, Node] = {}
    new = torch.fx.Graph()
    result = new.graph_copy(gm.graph, copies)
    new.output(([copies[n] for n in nodes], result))
    return GraphModule(gm, new)
