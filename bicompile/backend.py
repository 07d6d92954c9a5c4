"""The ``batch_invariant`` backend of torch.compile: the whole way of a graph, in order.

Dynamo hands over a graph -> checks -> AOTAutograd with attention kept whole (`bicompile.capture`)
-> our passes (`bicompile.pipeline`) -> Inductor under pinned numerics (`bicompile.inductor`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from bicompile import ahead, artifacts, capture, inductor, native
from bicompile.graph import device_of, subgraphs
from bicompile.options import Options
from bicompile.passes.drop_whole_slices import drop_whole_slices
from bicompile.passes.read_halves import read_halves
from bicompile.passes.repeat_kv import undo_repeat_kv_of_gradients
from bicompile.passes.wide_statistics import wide_statistics
from bicompile.pipeline import OPTIONAL, Run, run_pipeline
from bicompile.registry import KERNELS, OTHERS
from bicompile.report import REPORTS, Report, digest

capture.configure()


def batch_invariant(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile a graph such that no row's bits depend on the rest of the batch.

    Args:
        gm: the graph captured by Dynamo.
        example_inputs: fake or real inputs.
        mode: as in torch.compile; "reduce-overhead" records CUDA graphs.
        options: see `bicompile.options.Options`.

    Bits:
        each output element depends on the values it reads, the sizes it reduces over, the dtypes
        and the machine type, on nothing else.

    Raises:
        BicompileError: the guarantee cannot be given; the subclass and its text say why.

    Example:
        >>> fn = torch.compile(torch.nn.Linear(8, 4), backend="batch_invariant")  # doctest: +SKIP
    """
    with capture.error_boundary():
        parsed = Options.parse(options, passes=OPTIONAL)
        capture.check(gm, example_inputs, parsed)
        return _compile(gm, example_inputs, mode, parsed)


Finish = Callable[..., Any]


def _over_both(graph: Graph) -> None:
    """The passes over forward and backward together."""
    drop_whole_slices(graph)
    wide_statistics(graph)
    read_halves(graph)
    undo_repeat_kv_of_gradients(graph)


def lower(
    gm: GraphModule, inputs: list[Any], run: Callable[..., Run], finish: Finish, **kwargs: Any
) -> Any:
    """AOTAutograd and our passes.

    Args:
        gm: the graph captured by Dynamo.
        inputs: its inputs.
        run: makes the run of our passes over one traced graph, told what kind of graph it is.
        finish: compiles what they leave: called with the run and all that Inductor hands over.
        kwargs: for `inductor.compile_graph`.
    """

    def inner(gm: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        kinds = {k: bool(kwargs.get(f"is_{k}")) for k in ("backward", "inference")}
        here = run(**kinds)
        run_pipeline(gm, here)
        return finish(here, gm, inputs, **kwargs)

    capture.open_flex_attention(gm)
    with capture.attention_whole():
        return inductor.compile_graph(
            gm,
            inputs,
            inner=inner,
            decompositions=capture.decomposition_table(),
            whole=_over_both,
            **kwargs,
        )


def _compile(
    gm: GraphModule, inputs: list[Any], mode: str | None, options: Options
) -> Callable[..., Any]:
    stamp = _stamp(mode, options)
    key = digest([stamp, *capture.fingerprint(gm, inputs)])
    folder = inductor.cache_dir() / "bicompile"
    kept = Report.load(folder, key)
    report = Report(key)

    def finish(run: Run, gm: GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        report.families |= families_on_cpu(gm)
        report.save(folder)
        native.load(report.families)
        if run.history:
            artifacts.emit(gm, run)
        with ahead.kernels_built(gm):
            return inductor.compile_inner(gm, inputs, **kwargs)

    run = functools.partial(Run, options, report, history=artifacts.wanted())
    once = functools.partial(lower, gm, inputs, run, finish, mode=mode, stamp=stamp)
    compiled = once()
    if not report.decisions and kept is None:
        # Served from the disk, but what was done to it is not known: do it again, seen.
        compiled = once(caches=False)
    seen = report if report.decisions or kept is None else kept
    native.load(seen.families)
    REPORTS.append(seen)
    return compiled  # type: ignore[no-any-return]


def families_on_cpu(gm: GraphModule) -> set[str]:
    """The families of our kernels that run on the CPU in a graph or in a graph that it calls."""
    ops = {kernel.op: kernel.family for kernel in KERNELS.values()}
    nodes = [node for module in subgraphs(gm) for node in module.graph.nodes if node.target in ops]
    return {ops[node.target] for node in nodes if device_of(node).type == "cpu"}


def _stamp(mode: str | None, options: Options) -> str:
    """What a compiled graph depends on besides the graph; part of the key of Inductor's caches."""
    precision = torch.get_float32_matmul_precision()
    others = sorted(repr((k.name, k.contract)) for k in OTHERS.values())
    return digest([source_hash(), repr(options), str(mode), precision, *others])


@functools.cache
def source_hash() -> str:
    """Digest of every source file of the package, passes and kernels included."""
    root = Path(__file__).parent
    folders = (root, root / "kernels", root / "passes")
    files = {
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in (".py", ".cpp", ".h")
    }
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(str(file.relative_to(root)).encode())
        hashed.update(file.read_bytes())
    return hashed.hexdigest()
