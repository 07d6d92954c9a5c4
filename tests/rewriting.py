"""A function through our passes: the graph they leave, what they say, and what it computes."""

from __future__ import annotations

import torch
import torch._inductor.lowering  # decompositions of pooling need it
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from bicompile import capture, native
from bicompile.options import Options
from bicompile.pipeline import OPTIONAL, Run, run_pipeline
from bicompile.report import Report


def x(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def rewrite(function, *args, **options):
    """The graph after our passes, the report, and the results of graph and function."""
    native.load()
    graphs, report = [], Report("test")
    chosen = Options.parse(options, passes=OPTIONAL)

    def compiler(gm, inputs):
        run = Run(chosen, report, inference=True)
        run_pipeline(gm, run)
        before = str(gm.graph)
        run_pipeline(gm, Run(chosen, Report("again"), inference=True))
        if "fuel" not in options:
            assert str(gm.graph) == before, "the pipeline is not idempotent"
        graphs.append(gm)
        return gm.forward

    def backend(gm, inputs):
        with capture.error_boundary(), capture.attention_whole():
            return aot_autograd(
                fw_compiler=compiler,
                inference_compiler=compiler,
                decompositions=capture.decomposition_table(),
            )(gm, inputs)

    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
        return graphs[0], report, result, function(*args)


def traced(function, *args, tracing_mode="fake"):
    """The graph that our passes leave of what a function calls, gradients among it."""
    native.load()
    table = capture.decomposition_table()
    with capture.attention_whole(), enable_python_dispatcher():
        gm = make_fx(lambda *a: function(*a), table, tracing_mode)(*args)
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with torch._guards.detect_fake_mode(inputs):
        run_pipeline(gm, Run(Options.parse({}, passes=OPTIONAL), Report("test"), inference=True))
    return gm


def gradient(function, x, grad):
    """Of a result for an input, and the result's gradient."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


def count(gm, op):
    return len(gm.graph.find_nodes(op="call_function", target=op))
