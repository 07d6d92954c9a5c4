"""A function and its gradients through capture and our passes, run node by node.

All is as in the backend, except that Inductor does not compile what is left: each pointwise op is
computed in float64 and rounded once, by which it is one function at every place.
"""

from __future__ import annotations

import torch
import torch._inductor.lowering  # decompositions of pooling need it
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Interpreter
from torch.utils._pytree import tree_map_only

from bicompile import capture, decompositions, native
from bicompile.graph import subgraphs, value
from bicompile.options import Options
from bicompile.passes.audit import ALLOWED
from bicompile.passes.rules import rule_of
from bicompile.pipeline import OPTIONAL, Run, run_pipeline
from bicompile.report import Report

POINTWISE = ALLOWED["pointwise"][1] | ALLOWED["halves"][1]


class NodeByNode(Interpreter):
    """Runs a graph; what is pointwise in float64, rounded to the dtype of the result."""

    def run_node(self, node):
        if (
            not isinstance(node.target, torch._ops.OpOverload)
            or _name(node.target) not in POINTWISE
        ):
            return super().run_node(node)
        out = value(node)
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        args = tree_map_only(torch.Tensor, lambda t: t.double() if _is_float(t) else t, args)
        return node.target(*args, **kwargs).to(out.dtype)


def _is_float(t):
    return t.is_floating_point()


def _name(op):
    return op._schema.name.split("::")[1]


class Compiled:
    """A function under our passes, and what its gradients are made of.

    `ops`: ops of ours in the backward graph, and gradients that rules and decompositions have
    entries for; `forward_ops`: ops of ours in the forward graph.
    """

    def __init__(self, function):
        native.load()
        self.ops, self.forward_ops = set(), set()
        self._table = capture._Table(capture.decomposition_table())
        for op, decompose in decompositions.TABLE.items():
            if "_backward" in str(op):
                self._table[op] = self._noted(op, decompose)
        self._call = torch.compile(function, backend=self._backend, fullgraph=True)

    def __call__(self, *args):
        return self._call(*args)

    def _noted(self, op, decompose):
        def decomposition(*args):
            self.ops.add(_name(op))
            return decompose(*args)

        return decomposition

    def _compiler(self, seen, backward):
        def compile(gm, inputs):
            targets = [n.target for n in gm.graph.nodes if "_backward" in str(n.target)]
            seen.update(_name(t) for t in targets if rule_of(t))
            options = Options.parse({}, passes=OPTIONAL)
            run_pipeline(gm, Run(options, Report("test"), backward=backward))
            for node in (n for module in subgraphs(gm) for n in module.graph.nodes):
                if getattr(node.target, "namespace", "") == "bicompile":
                    seen.add(_name(node.target))
            return NodeByNode(gm).run

        return compile

    def _backend(self, gm, inputs):
        capture.open_flex_attention(gm)
        with capture.error_boundary(), capture.attention_whole():
            return aot_autograd(
                fw_compiler=self._compiler(self.forward_ops, False),
                bw_compiler=self._compiler(self.ops, True),
                partition_fn=min_cut_rematerialization_partition,
                decompositions=self._table,
            )(gm, inputs)
