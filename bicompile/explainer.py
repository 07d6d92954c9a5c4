"""`bicompile.explain`: capture a program and let our passes work on it, on tensors without memory.

The way of a graph is that of the backend (`bicompile.backend.lower`), up to Inductor: nothing is
compiled and nothing is run, so a model may be larger than the memory, and on a GPU that is not
there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from bicompile import backend, capture, dry_capture, pins
from bicompile.api import check_settings
from bicompile.errors import UnsafeSetting
from bicompile.explanation import Explanation, GraphExplanation
from bicompile.graph import describe
from bicompile.independence import Independence, prove
from bicompile.options import Options
from bicompile.pipeline import OPTIONAL, Run
from bicompile.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, object] | None = None,
    dynamic: bool | None = None,
    device: str | None = None,
    training: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say what bicompile does with each node of a program, and why, without running it.

    Args:
        model: an nn.Module or a function; weights on the device "meta" take no memory and are taken
            for weights on the CPU.
        args: what it is called with; only dtypes and shapes count.
        options: see `bicompile.options.Options`; refusals are rows of the result, not errors.
        dynamic: as in torch.compile; None lets the batch axis vary, as `bicompile.compile` does.
        device: "cpu" or "cuda", whether or not this machine has one; None is where the weights are.
        training: also explain the gradient.
        kwargs: what the model is called with, by name.

    Bits:
        none are computed.

    Raises:
        Untraceable: the program does not fit in one graph.
        WrongInputs: the model does not take these inputs.
        UnsafeSetting: the model is set up in a way for which the guarantee cannot hold, or `device`
            is "cuda" for a PyTorch built without it.

    Example:
        >>> found = explain(torch.nn.Linear(8, 4), torch.randn(5, 8))
        >>> [(row.target, row.op) for row in found.rows if row.op.startswith("bicompile")]
        [('aten.addmm.default', 'bicompile.addmm.default')]
    """
    if device == "cuda" and not torch.backends.cuda.is_built():
        raise UnsafeSetting(
            setting="device",
            value="cuda",
            reason="this PyTorch is built without CUDA and cannot trace for it",
            accepted=["cpu"],
            todo="use a CUDA build of torch; no GPU or driver is needed to explain",
        )
    parsed = Options.parse(options, passes=OPTIONAL)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, torch.nn.Module):
        check_settings(model)
    given = ", ".join([*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items())])
    graphs: list[GraphExplanation] = []
    proofs: list[Independence] = []
    seen: list[str] = []
    with dry_capture.placed(model, (args, kwargs), device) as (args, kwargs):
        if dynamic is None:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    capture.mark_batch_dynamic(leaf)
        watch = functools.partial(
            _backend, options=parsed, graphs=graphs, proofs=proofs, devices=seen
        )
        _trace(model, args, kwargs, watch, dynamic=dynamic, training=training, given=given)
    where = "cuda" if "cuda" in seen else "cpu"
    title = getattr(model, "__qualname__", type(model).__name__)
    settings = {
        "inputs": given,
        "device": where,
        "shapes": {None: "batch varies", True: "dynamic", False: "static"}[dynamic],
        "training": training,
        "options": dict(options or {}),
    }
    return Explanation(title, graphs, pins.pins(graphs, where), settings, proofs)


def _trace(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    watch: Callable[..., Any],
    *,
    dynamic: bool | None,
    training: bool,
    given: str,
) -> None:
    """Let Dynamo capture the program and hand it to `watch`, which stops it there."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    for compiled_by in ("bicompile_original", "_torchdynamo_orig_callable"):
        forward = getattr(forward, compiled_by, forward)
    compiled = torch.compile(forward, backend=watch, fullgraph=True, dynamic=dynamic)
    with (
        contextlib.suppress(dry_capture.Captured),
        dry_capture.failures(given),
        dry_capture.unseen(),
        torch.set_grad_enabled(training),
    ):
        compiled(*args, **kwargs)


def _backend(
    gm: GraphModule,
    inputs: list[Any],
    *,
    options: Options,
    graphs: list[GraphExplanation],
    proofs: list[Independence],
    devices: list[str],
) -> Any:
    """The backend up to Inductor, and out again."""
    with capture.error_boundary():
        capture.check(gm, inputs, options)
        devices += {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
        names = dry_capture.input_names(gm)

        def finish(run: Run, gm: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
            graphs.append(GraphExplanation.of(gm, run, () if run.backward else names))
            if not run.backward:
                proofs.extend(prove(gm))
            return gm.forward

        def run(**kinds: bool) -> Run:
            return Run(options, Report("explained"), history=True, collect=True, **kinds)

        backend.lower(gm, inputs, run, finish, caches=False)
    raise dry_capture.Captured(first_useful_frame=None)
