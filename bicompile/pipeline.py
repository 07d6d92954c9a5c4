"""The passes in their order, and the one runner for all of them.

A pass is ``def name(gm, *, run) -> None``: it asks ``run.fuel()`` before each rewrite and records
a `Decision` with ``run.decide(...)``.  It is idempotent, keeps ``meta["val"]`` true and never
introduces aliasing.  Its docstring shows a graph before and after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from bicompile import graph, provenance
from bicompile.errors import BicompileError
from bicompile.options import Options
from bicompile.passes.audit import audit
from bicompile.passes.canonicalize import canonicalize
from bicompile.passes.deduplicate import deduplicate
from bicompile.passes.fuse import fuse
from bicompile.passes.replace import replace
from bicompile.passes.schedule import schedule
from bicompile.provenance import Snapshot
from bicompile.report import Decision, Report, Verdict

log = logging.getLogger(__name__)

Pass = Callable[..., None]
PIPELINE: tuple[Pass, ...] = (canonicalize, replace, fuse, deduplicate, schedule, audit)
OPTIONAL = tuple(step.__name__ for step in PIPELINE if step not in (schedule, audit))
"""Passes that `options={"disable": ...}` may leave out."""


@dataclass
class Run:
    """One run of the pipeline over one graph: its options, its fuel and its report.

    With `history`, the nodes of the graph are written down before the first pass, and each keeps
    its name through the passes.  With `collect`, refusals are decisions instead of errors.
    """

    options: Options
    report: Report
    backward: bool = False
    inference: bool = False
    history: bool = False
    collect: bool = False
    captured: list[Snapshot] = field(default_factory=list, init=False)
    rewrites: int = field(default=0, init=False)
    step: str = field(default="", init=False)
    refused: set[Node] = field(default_factory=set, init=False)

    def fuel(self) -> bool:
        """Whether one more rewrite may be made; counts it."""
        if self.options.fuel is not None and self.rewrites >= self.options.fuel:
            return False
        self.rewrites += 1
        return True

    def decide(
        self, node: Node, reason: str, *, became: str | None = None, verdict: Verdict | None = None
    ) -> None:
        """Record what happens to a node."""
        if verdict is None:
            verdict = Verdict.DETERMINISTIC if self.backward and became else Verdict.INVARIANT
        decision = Decision(
            node.name,
            str(node.target),
            became,
            verdict,
            reason,
            graph.user_line(node),
            self.step,
            graph.origins(node),
        )
        self.report.decisions.append(decision)

    def refuse(self, node: Node, error: BicompileError) -> None:
        """Raise the error, or write it down once for each node if refusals are collected."""
        if not self.collect:
            raise error
        if node not in self.refused:
            self.refused.add(node)
            self.decide(node, str(error), verdict=Verdict.REFUSED)


def run_pipeline(gm: GraphModule, run: Run) -> None:
    """Apply every pass that is not disabled to the graph and to all graphs nested in it."""
    if run.history:
        run.captured = provenance.begin(gm)
    for step in PIPELINE:
        name = step.__name__
        if name in run.options.disable:
            continue
        run.step = name
        start = time.perf_counter()
        for module in list(graph.subgraphs(gm)):
            step(module, run=run)
            module.graph.eliminate_dead_code()
            module.graph.lint()
            module.recompile()
        run.report.seconds[name] = time.perf_counter() - start
        log.debug("%s: %.3f s\n%s", name, run.report.seconds[name], gm.graph)
    log.info("graph %s: %s", run.report.key, dict(run.report.counts()))
