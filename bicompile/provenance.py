"""Which node became which: the captured graph before our passes, tied to the graph after them.

Before the first pass every node is given its own name as its origin (`bicompile.graph.ORIGINS` in
``node.meta``); `Emit`, `take_place` and `deduplicate` hand origins on, so no pass needs to tell.
A captured node without a successor was absorbed by the nodes that its users became, or, where
nothing reads it, removed.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from bicompile import cost, graph
from bicompile.errors import LostDecision
from bicompile.report import Decision, Verdict

_ROOT = re.compile(r"^L\[[^\]]*\](?:\[\d+\])*\.?(?:__self__\.?)?")
_WORST = (Verdict.INVARIANT, Verdict.DETERMINISTIC, Verdict.ALLOWED, Verdict.REFUSED)


@dataclass(frozen=True)
class Snapshot:
    """A node as text.

    Args:
        name: of the node; behind the name of the nested graph that it stands in, if any.
        target: what it calls.
        arguments: of the call.
        holds: dtype and sizes of its value.
        line: the user's source line.
        module: path of the nn.Module whose `forward` called it.
        reads: names of the nodes whose values it takes.
        origins: names of the captured nodes that it stands for.
        flop: floating-point operations of matmuls, attention and convolutions; 0 for others.
        bytes: size of what it reads and writes, if it is not a view.
    """

    name: str
    target: str
    arguments: str
    holds: str
    line: str | None
    module: str
    reads: tuple[str, ...]
    origins: tuple[str, ...]
    flop: int
    bytes: int

    @property
    def text(self) -> str:
        """The node as a line of a program."""
        return f"{self.name}: {self.holds} = {self.target}({self.arguments})"


def nodes(gm: GraphModule) -> Iterator[tuple[str, Node]]:
    """Every call of a graph and of the graphs nested in it, with its name."""
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function":
                    yield (f"{path}/{node.name}" if path else node.name), node


def begin(gm: GraphModule) -> list[Snapshot]:
    """Give every node its name as origin, and write the graph down."""
    for name, node in nodes(gm):
        node.meta[graph.ORIGINS] = (name,)
    return snapshot(gm)


def snapshot(gm: GraphModule) -> list[Snapshot]:
    """The calls of a graph and of the graphs nested in it."""
    return [_snapshot(name, node) for name, node in nodes(gm)]


def _snapshot(name: str, node: Node) -> Snapshot:
    prefix = name.removesuffix(node.name)
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return Snapshot(
        name=name,
        target=graph.target_name(node),
        arguments=", ".join(arguments),
        holds=graph.describe(node.meta.get("val")),
        line=graph.user_line(node),
        module=module_path(node),
        reads=tuple(prefix + n.name for n in node.all_input_nodes),
        origins=graph.origins(node),
        flop=cost.flop(node),
        bytes=cost.moved_bytes(node),
    )


def _argument(x: object) -> str:
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(_argument(v) for v in x)}]"
    return f"%{x.name}" if isinstance(x, Node) else str(x)


def module_path(node: Node) -> str:
    """The path of the innermost nn.Module that a node came from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return _ROOT.sub("", str(path))


class Kind(enum.Enum):
    """What became of a captured node."""

    KEPT = "kept"
    REPLACED = "replaced"
    ABSORBED = "absorbed"
    """A wider op computes it on the way, or reads what was before it."""
    REMOVED = "removed"
    """Nothing reads it."""


@dataclass(frozen=True)
class Fate:
    """The one fate of a captured node: the nodes it became, and the decisions about it."""

    node: Snapshot
    kind: Kind
    became: tuple[Snapshot, ...]
    decisions: tuple[Decision, ...]
    verdict: Verdict


def fates(
    before: Sequence[Snapshot], after: Sequence[Snapshot], decisions: Sequence[Decision]
) -> list[Fate]:
    """One fate for each captured node, in order.

    Raises:
        LostDecision: a pass let a node stand or rewrote it without saying why.
    """
    became: dict[str, list[Snapshot]] = defaultdict(list)
    for node in after:
        for origin in node.origins:
            became[origin].append(node)
    about: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        for origin in decision.origins:
            about[origin].append(decision)
    users: dict[str, list[str]] = defaultdict(list)
    for node in before:
        for name in node.reads:
            users[name].append(node.name)
    found: dict[str, Fate] = {}
    for node in reversed(before):  # users come first
        heirs = [found[user] for user in users[node.name]]
        found[node.name] = _fate(node, became[node.name], about[node.name], heirs)
    return [found[node.name] for node in before]


def _fate(
    node: Snapshot, became: Sequence[Snapshot], about: Sequence[Decision], users: Sequence[Fate]
) -> Fate:
    if became:
        if not any(d.step != "deduplicate" for d in about):
            raise LostDecision(node=node.name, op=node.target, line=node.line)
        kind = Kind.KEPT if any(b.target == node.target for b in became) else Kind.REPLACED
        return Fate(node, kind, tuple(became), tuple(about), _worst(about))
    heirs = [fate for fate in users if fate.kind is not Kind.REMOVED]
    if not heirs:
        return Fate(node, Kind.REMOVED, (), tuple(about), _worst(about))
    became = [b for fate in heirs for b in _main(fate.became)]
    inherited = [d for fate in heirs for d in fate.decisions]
    verdict = _worst([*about, *inherited])
    return Fate(node, Kind.ABSORBED, tuple(dict.fromkeys(became)), tuple(about), verdict)


def _main(became: Sequence[Snapshot]) -> Sequence[Snapshot]:
    """Those that compute, if there are any besides those that pick a result."""
    return [b for b in became if b.target != "getitem"] or became


def _worst(decisions: Sequence[Decision]) -> Verdict:
    return max((d.verdict for d in decisions), key=_WORST.index, default=Verdict.INVARIANT)
