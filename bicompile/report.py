"""What was done to a graph: one `Decision` per node, one `Report` per graph."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class Verdict(enum.Enum):
    """How far the guarantee goes for one node."""

    INVARIANT = "invariant"
    """The row law holds."""
    DETERMINISTIC = "deterministic only"
    """Same inputs, same bits, in every run; but it reads the batch, or places in it."""
    ALLOWED = "not guaranteed"
    """Let through by an option."""
    REFUSED = "refused"
    """An error where the program is compiled; only `bicompile.explain` goes on."""


@dataclass(frozen=True)
class Decision:
    """What one pass did to one node.

    Args:
        node: name of the node in the graph.
        target: the op it called.
        became: the op of ours that took its place, or None if it was left alone.
        verdict: how far the guarantee goes.
        reason: why, in a few words.
        line: the user's source line, if known.
        step: the pass that decided.
        origins: nodes of the captured graph that the node stood for, where account is kept.
    """

    node: str
    target: str
    became: str | None
    verdict: Verdict
    reason: str
    line: str | None = None
    step: str = ""
    origins: tuple[str, ...] = ()


@dataclass
class Report:
    """All decisions about one graph, in order.

    Args:
        key: digest of the captured graph, its inputs and the options.
        decisions: one per node of the graph that was rewritten or let through.
        cached: whether the compiled graph and the decisions came from the disk.
        families: of our kernels that run on the CPU in the compiled graphs.
        seconds: time per pass.
    """

    key: str
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    cached: bool = False
    families: set[str] = dataclasses.field(default_factory=set)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """How often each op of ours stands in the graph, and how often each verdict was given."""
        became = Counter(d.became for d in self.decisions if d.became)
        return became + Counter(d.verdict.value for d in self.decisions)

    def save(self, folder: Path) -> None:
        """Keep the report beside the compiled graph; a reader never sees half of it."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(d) | {"verdict": d.verdict.value} for d in self.decisions]
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump({"decisions": rows, "families": sorted(self.families)}, file)
        Path(file.name).replace(folder / f"{self.key}.json")

    @classmethod
    def load(cls, folder: Path, key: str) -> Report | None:
        """Read back a report, or None if there is none."""
        try:
            kept = json.loads((folder / f"{key}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        rows = [
            Decision(**row | {"verdict": Verdict(row["verdict"]), "origins": tuple(row["origins"])})
            for row in kept["decisions"]
        ]
        return cls(key, rows, cached=True, families=set(kept["families"]))


REPORTS: list[Report] = []
"""The graphs compiled in this process, in order."""


def digest(parts: Sequence[str]) -> str:
    """A short name for a sequence of texts."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode())
        hashed.update(b"\0")
    return hashed.hexdigest()[:32]
