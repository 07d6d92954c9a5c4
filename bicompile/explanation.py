"""What an explanation holds: for every captured node its one fate, and the graphs it stands in."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from bicompile import provenance, schedules
from bicompile.independence import Independence
from bicompile.pipeline import Run
from bicompile.program import Step, steps
from bicompile.provenance import Fate, Snapshot
from bicompile.registry import KERNELS, OPS
from bicompile.report import Decision, Verdict


@dataclass(frozen=True)
class Row:
    """One captured node and its fate.

    Args:
        name: of the node.
        target: the op that it calls.
        holds: dtype and sizes of its value.
        line: the user's source line.
        module: path of the nn.Module that called it.
        kind: kept, replaced, absorbed (into a wider op) or removed (nothing reads it).
        became: names of the nodes of the final graph that stand for it.
        op: what it is computed by now.
        rule: the pass that decided, and why.
        order: how the terms of one output element are combined, where that is pinned.
        schedule: the schedule that the sizes at hand choose.
        schedules: all that may be chosen: they give the same bits.
        verdict: how far the guarantee goes.
        flop: floating-point operations of matmuls, attention and convolutions.
        bytes: of what the node reads and writes by itself.
    """

    name: str
    target: str
    holds: str
    line: str | None
    module: str
    kind: str
    became: tuple[str, ...]
    op: str
    rule: str
    order: str
    schedule: str
    schedules: tuple[str, ...]
    verdict: Verdict
    flop: int
    bytes: int

    def json(self) -> dict[str, Any]:
        """The row as plain data."""
        return dataclasses.asdict(self) | {"verdict": self.verdict.value}


@dataclass
class GraphExplanation:
    """One traced graph before and after our passes.

    Args:
        name: "inference", "forward" or "backward".
        rows: one per captured node, in order.
        before: the captured nodes.
        after: the nodes that Inductor would get.
        program: the steps of the final graph that round, in order.
    """

    name: str
    rows: list[Row]
    before: list[Snapshot]
    after: list[Snapshot]
    program: list[Step]

    @classmethod
    def of(cls, gm: GraphModule, run: Run, inputs: Sequence[str] = ()) -> GraphExplanation:
        """Explain a graph that went through the passes under a run that kept its history.

        Raises:
            LostDecision: a pass did not say what it did.
        """
        after = provenance.snapshot(gm)
        decisions = run.report.decisions
        fates = provenance.fates(run.captured, after, decisions)
        choices = {name: schedules.choose(node) for name, node in provenance.nodes(gm)}
        rows = [_row(fate, choices) for fate in fates]
        name = "backward" if run.backward else "inference" if run.inference else "forward"
        return cls(name, rows, run.captured, after, steps(gm, inputs))

    def diff(self) -> str:
        """The unified diff of the two graphs."""
        before, after = ([node.text for node in side] for side in (self.before, self.after))
        lines = difflib.unified_diff(before, after, "captured", "rewritten", n=2, lineterm="")
        return "\n".join(lines)


def _row(fate: Fate, choices: Mapping[str, schedules.Choice | None]) -> Row:
    node, main = fate.node, _computing(fate)
    choice = choices.get(main.name) if main else None
    order = ""
    if main and main.target.startswith("bicompile."):
        order = OPS[main.target.split(".")[1]].order
    return Row(
        name=node.name,
        target=node.target,
        holds=node.holds,
        line=node.line,
        module=node.module,
        kind=fate.kind.value,
        became=tuple(b.name for b in fate.became),
        op=main.target if main else "",
        rule=_rule(fate),
        order=order,
        schedule=choice.chosen if choice else "",
        schedules=choice.allowed if choice else (),
        verdict=fate.verdict,
        flop=node.flop,
        bytes=node.bytes,
    )


def _computing(fate: Fate) -> Snapshot | None:
    """The node that does the work: the same op if it was kept, else ours, else the last."""
    for match in (fate.node.target, "bicompile."):
        for node in fate.became:
            if node.target.startswith(match):
                return node
    return fate.became[-1] if fate.became else None


def _rule(fate: Fate) -> str:
    told = [d for d in fate.decisions if d.step != "deduplicate"]
    refused = [d for d in told if d.verdict is Verdict.REFUSED]
    if refused:
        return _told(refused[0])
    if fate.kind is provenance.Kind.REMOVED:
        return "nothing reads it"
    if fate.kind is provenance.Kind.ABSORBED:
        return "; ".join([*map(_told, told), "computed by " + ", ".join(_ops(fate.became))])
    rewritten = [d for d in told if d.became]
    return _told((rewritten or told)[-1])


def _told(decision: Decision) -> str:
    became = f" -> {decision.became}" if decision.became else ""
    named = any(decision.reason == kernel.order for kernel in KERNELS.values())
    return f"{decision.step}{became}" + ("" if named else f": {decision.reason}")


def _ops(nodes: Sequence[Snapshot]) -> list[str]:
    return list(dict.fromkeys(n.target for n in nodes))


@dataclass
class Explanation:
    """What bicompile does with a program: returned by `bicompile.explain`.

    Args:
        title: what was explained.
        graphs: its graphs; one, or forward and backward in training.
        pins: what the bits depend on besides the graph, by name.
        settings: what the program was explained for.
        independence: for each output, whether its rows are proven to read no other row (see
            `bicompile.independence`); nothing is known where the batch size is a number.
    """

    title: str
    graphs: list[GraphExplanation]
    pins: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    independence: list[Independence] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """The captured nodes of all graphs."""
        return [row for graph in self.graphs for row in graph.rows]

    @property
    def refused(self) -> list[Row]:
        """The nodes for which the guarantee cannot be given."""
        return [row for row in self.rows if row.verdict is Verdict.REFUSED]

    def counts(self) -> Counter[str]:
        """How many captured nodes are of each class."""
        return Counter(row.verdict.value for row in self.rows)

    def text(self, *, all: bool = False, width: int = 120) -> str:
        """Tables for a terminal: repeated layers are one, only what combines numbers has a row.

        Args:
            all: a row for every node.
            width: columns of the terminal.

        Raises:
            GraphTooLarge: with `all`, more rows than anybody reads.
        """
        from bicompile.explanation_text import render

        return render(self, all=all, width=width)

    def json(self) -> str:
        """Everything but the code, as one JSON document."""
        document = {
            "title": self.title,
            "settings": self.settings,
            "pins": self.pins,
            "counts": self.counts(),
            "independence": [dataclasses.asdict(proof) for proof in self.independence],
            "graphs": [{"name": g.name, "nodes": [r.json() for r in g.rows]} for g in self.graphs],
        }
        return json.dumps(document, indent=1, default=str)

    def html(self, path: str | Path) -> Path:
        """Write a page with both graphs side by side; it needs no network."""
        from bicompile.explanation_page import render

        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path
