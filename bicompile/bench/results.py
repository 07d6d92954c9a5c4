"""What the bench found: rows, the file they are kept in, the tables and their summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bicompile.bench.cases import OURS, Case
from bicompile.errors import UnsafeSetting

BETTER = "better mode"
"""The base of a ratio: case by case, the faster of the modes of default torch.compile."""
FEW_ROWS = 128
"""Up to so many rows, a matmul is bound by reading its weights."""
_SAME = ("suite", "machine")  # what the tables of one file have in common


@dataclass(frozen=True)
class Row:
    """One line of the result: what was measured, and the figure of each system."""

    what: str
    unit: str
    figures: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Systems without a figure, and why."""

    def ratio(self, *bases: str) -> float | None:
        """Ours divided by the best of `bases`, or None where a side is missing."""
        known = [self.figures[base] for base in bases if base in self.figures]
        if not known or OURS not in self.figures:
            return None
        return self.figures[OURS] / min(known)

    def beside(self, figures: Mapping[str, float]) -> Row:
        """The row with more figures."""
        return replace(self, figures={**self.figures, **figures})

    @property
    def case(self) -> Case | None:
        """The case that was timed, or None for other figures."""
        group, _, batch = self.what.partition(" batch ")
        return Case(group, int(batch)) if batch else None


@dataclass
class Report:
    """All tables of one machine and suite; what is added stands in the file at once."""

    suite: str
    machine: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    """What was run, in order."""
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    """By dtype: bytes copied and operations done per second."""
    tables: dict[str, list[Row]] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `save` wrote."""
        found = json.loads(path.read_text())
        tables = {name: [Row(**row) for row in rows] for name, rows in found.pop("tables").items()}
        return cls(**found, tables=tables, path=path)

    @classmethod
    def open(cls, path: Path | None, suite: str, machine: dict[str, Any]) -> Report:
        """Go on with the file of an earlier run, or start one.

        Raises:
            UnsafeSetting: the file holds figures of another machine, other versions or another
                suite, which must not stand beside these.
        """
        new = cls(suite, machine, path=path)
        if path is None or not path.exists():
            return new
        old = cls.load(path)
        for name in _SAME:
            if getattr(old, name) != getattr(new, name):
                raise UnsafeSetting(
                    setting="--json",
                    value=path,
                    reason=f"it holds figures of another {name}",
                    accepted=["a new file", "a file of the same machine, versions and suite"],
                    todo="name another file, or remove this one",
                )
        return old

    def note(self, command: str) -> None:
        """Remember what was run."""
        self.commands = [c for c in self.commands if c != command] + [command]

    def start(self, table: str) -> None:
        """Begin a table; one of that name from an earlier run is given up."""
        self.tables[table] = []

    def add(self, table: str, row: Row) -> None:
        """Add a row, and save."""
        self.tables[table].append(row)
        self.save()

    def save(self) -> None:
        """Write the file, by rename, so that a killed run leaves a whole one."""
        if self.path is None:
            return
        tables = {name: [asdict(row) for row in rows] for name, rows in self.tables.items()}
        found = {name: getattr(self, name) for name in ("suite", "machine", "commands", "limits")}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(found | {"tables": tables}, indent=1) + "\n")
        part.replace(self.path)


def bases(rows: Sequence[Row]) -> list[str]:
    """The systems that ours is compared with, in the order of their first appearance."""
    return [s for s in dict.fromkeys(s for row in rows for s in row.figures) if s != OURS]


@dataclass(frozen=True)
class Ratio:
    """Ours against a base over some cases; below 1 ours takes less."""

    table: str
    what: str
    base: str
    cases: int
    mean: float
    """Geometric."""
    worst: float
    worst_case: str


def summary(tables: Mapping[str, Sequence[Row]]) -> Iterator[Ratio]:
    """Each family of cases against each system, and models against the best of them.

    Matmuls of up to `FEW_ROWS` rows, of more, and of rows that are no power of two are families of
    their own.
    """
    for table, rows in tables.items():
        families: dict[str, list[Row]] = {}
        for row in rows:
            if row.case is not None or row.what.partition(" ")[0].isdecimal():
                families.setdefault(family(row), []).append(row)
        for what, members in families.items():
            yield from _against(table, what, members)


def family(row: Row) -> str:
    """The kind of a row's case; of matmuls also how many rows they have."""
    if row.case is None:
        return "sequences"
    if row.case.kind == "mm":
        if row.case.batch.bit_count() > 1:
            return "mm, M no power of two"
        few = row.case.batch <= FEW_ROWS
        return f"mm, M {'<=' if few else '>'} {FEW_ROWS}"
    return row.case.kind


def _against(table: str, what: str, rows: Sequence[Row]) -> Iterator[Ratio]:
    rivals = [base for base in bases(rows) if base != "limit"]
    choices: dict[str, tuple[str, ...]] = {base: (base,) for base in bases(rows)}
    if not table.startswith("ops") and len(rivals) > 1:
        choices = {BETTER: tuple(rivals), **choices}
    for name, base in choices.items():
        ratios = {row.what: r for row in rows if (r := row.ratio(*base)) is not None}
        if ratios:
            worst = max(ratios, key=lambda case: ratios[case])
            mean = math.exp(math.fsum(map(math.log, ratios.values())) / len(ratios))
            yield Ratio(table, what, name, len(ratios), mean, ratios[worst], worst)
