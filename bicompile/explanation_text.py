"""An explanation as tables for a terminal, repeated layers folded."""

from __future__ import annotations

import io
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bicompile.errors import GraphTooLarge
from bicompile.report import Verdict

if TYPE_CHECKING:
    from bicompile.explanation import Explanation, Row

LIMIT = 500
"""Rows of a table in a terminal."""

WIDE = 110
"""Columns of a terminal that has place for source lines and schedules."""

COLUMNS = ("module", "line", "op", "becomes", "order", "schedule", "class", "FLOP", "bytes")

COLOURS = {
    Verdict.INVARIANT: "green",
    Verdict.DETERMINISTIC: "yellow",
    Verdict.ALLOWED: "magenta",
    Verdict.REFUSED: "red",
}

_LAYER = re.compile(r"(.*?)(?<![^.])(\d+)(?![^.])(.*)")


@dataclass(frozen=True)
class Block:
    """Equal layers: the rows of each of them, and the numbers of the first and the last."""

    prefix: str
    first: int | None
    last: int | None
    layers: tuple[tuple[Row, ...], ...]

    @property
    def title(self) -> str:
        """The module path, with the range of layers that it stands for."""
        if self.first is None:
            return self.prefix or "the model itself"
        more = f"-{self.last} ({len(self.layers)} equal layers)" if len(self.layers) > 1 else ""
        return f"{self.prefix}{self.first}{more}"


def blocks(rows: Sequence[Row]) -> list[Block]:
    """The rows by layer, in order; neighbouring layers that differ in names only are one block."""
    found: list[Block] = []
    for (prefix, number), group in groupby(rows, key=_layer):
        layer = tuple(group)
        before = found[-1] if found else None
        if (
            before is not None
            and number is not None
            and before.prefix == prefix
            and before.last == number - 1
            and _shape(before.layers[0]) == _shape(layer)
        ):
            found[-1] = Block(prefix, before.first, number, (*before.layers, layer))
        else:
            found.append(Block(prefix, number, number, (layer,)))
    return found


def _layer(row: Row) -> tuple[str, int | None]:
    match = _LAYER.fullmatch(row.module)
    return (match[1], int(match[2])) if match else (row.module.partition(".")[0], None)


def _inside(row: Row) -> str:
    """Where in its layer a row stands."""
    match = _LAYER.fullmatch(row.module)
    return match[3].lstrip(".") if match else row.module


def _shape(rows: Sequence[Row]) -> list[object]:
    return [
        (_inside(r), r.target, r.op, r.kind, r.holds, r.order, r.schedule, r.verdict) for r in rows
    ]


def render(explanation: Explanation, *, all: bool, width: int) -> str:
    """The tables as plain text."""
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    console.print(renderable(explanation, all=all, width=width))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def renderable(explanation: Explanation, *, all: bool = False, width: int = WIDE) -> RenderableType:
    """The tables for a rich console.

    Raises:
        GraphTooLarge: more than `LIMIT` rows.
    """
    parts: list[RenderableType] = [_summary(explanation)]
    for graph in explanation.graphs:
        folded = blocks([r for r in graph.rows if all or not _is_size(r)])
        rows = sum(len(_shown(b.layers[0], all)) for b in folded)
        if rows > LIMIT:
            raise GraphTooLarge(rows=rows, limit=LIMIT)
        parts.append(_table(graph.name, folded, all=all, width=width))
    parts += [_refusal(row) for row in _different_refusals(explanation.refused)]
    return Group(*parts)


def _summary(explanation: Explanation) -> Text:
    counts = explanation.counts()
    text = Text(f"{explanation.title}: {len(explanation.rows)} nodes, ")
    for verdict, colour in COLOURS.items():
        if counts[verdict.value]:
            text.append(f"{counts[verdict.value]} {verdict.value}", colour).append(", ")
    flop, size = (sum(getattr(r, k) for r in explanation.rows) for k in ("flop", "bytes"))
    text.append(f"{flop / 1e9:.3g} GFLOP, {size / 1e9:.3g} GB moved node by node\n")
    settings = explanation.settings
    return text.append(
        f"on {settings['device']}, {settings['shapes']}: {settings['inputs']}", "dim"
    )


def _table(name: str, folded: Sequence[Block], *, all: bool, width: int) -> Table:
    wide = width >= WIDE
    rows = [row for block in folded for layer in block.layers for row in layer]
    orders = list(dict.fromkeys(r.order for r in rows if r.order))
    legend = "\n".join(f"{_letter(i)}  {order}" for i, order in enumerate(orders))
    table = Table(title=f"{name} graph", caption=legend, title_justify="left")
    table.caption_justify = "left"
    left_out = set() if wide else {"line", "schedule"}
    if not wide and _all_invariant(rows):
        left_out.add("class")
    columns = [name for name in COLUMNS if name not in left_out]
    longest = min(max((len(b.title) for b in folded), default=0), width // 3)
    for heading in columns:
        justify: Any = "right" if heading in ("FLOP", "bytes") else "left"
        least = longest if heading == "module" else None
        table.add_column(heading, overflow="fold", justify=justify, min_width=least)
    for block in folded:
        table.add_row(Text(block.title, "bold"))
        for cells in _lines(block, orders, rows, all=all, wide=wide):
            table.add_row(*(cells.get(column, "") for column in columns))
        table.add_section()
    return table


def _lines(
    block: Block, orders: Sequence[str], rows: Sequence[Row], *, all: bool, wide: bool
) -> Iterator[dict[str, Text | str]]:
    """The rows of a block, each for all its equal layers, and a last one for what is not shown."""
    first = block.layers[0]
    shown = [number for number, row in enumerate(first) if _is_shown(row, all)]
    for number in shown:
        letter = _letter(orders.index(first[number].order)) if first[number].order else ""
        yield _cells(first[number], letter, wide) | _shares([x[number] for x in block.layers], rows)
    rest = [n for n in range(len(first)) if n not in shown]
    if rest:
        others = [first[n] for n in rest]
        said = _others(others) if wide else f"{len(others)} more"
        every = [layer[n] for layer in block.layers for n in rest]
        named: dict[str, Text | str] = {"module": Text(f"  and {said}", "dim")}
        yield named | _shares(every, rows)


def _shares(rows: Sequence[Row], total: Sequence[Row]) -> dict[str, Text | str]:
    return {
        "FLOP": _share(sum(r.flop for r in rows), sum(r.flop for r in total)),
        "bytes": _share(sum(r.bytes for r in rows), sum(r.bytes for r in total)),
    }


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.1f}%" if part else ""


def _all_invariant(rows: Iterable[Row]) -> bool:
    return {row.verdict for row in rows} <= {Verdict.INVARIANT}


def _is_size(row: Row) -> bool:
    """Whether a node computes a size, not a tensor."""
    return row.verdict is Verdict.INVARIANT and row.rule == "audit: arithmetic on sizes"


def _letter(number: int) -> str:
    return string.ascii_letters[number % 52]


def _shown(rows: Sequence[Row], all: bool) -> list[Row]:
    return [row for row in rows if _is_shown(row, all)]


def _is_shown(row: Row, all: bool) -> bool:
    """Whether a row combines numbers in an order of ours, or lies outside the guarantee."""
    ours = row.op.startswith("bicompile.") and (row.kind in ("kept", "replaced") or row.flop > 0)
    return all or ours or row.verdict is not Verdict.INVARIANT


def _cells(row: Row, letter: str, wide: bool) -> dict[str, Text | str]:
    plain = row.kind in ("kept", "replaced") or (row.op and not wide)
    became = row.op if plain else f"{row.kind}: {row.op}".rstrip(": ")
    choices = f" (1 of {len(row.schedules)})" if len(row.schedules) > 1 else ""
    return {
        "module": f"  {_inside(row)}",
        "line": short_line(row.line),
        "op": _short(row.target, wide),
        "becomes": "" if became == row.target and not letter else _short(became, wide),
        "order": letter,
        "schedule": row.schedule + choices,
        "class": Text(row.verdict.value, COLOURS[row.verdict]),
    }


def _short(op: str, wide: bool) -> str:
    """The name of an op; in a narrow terminal without its namespace."""
    name = op.removesuffix(".default")
    return name if wide else re.sub(r"\b(aten|prims|bicompile)\.", "", name)


def short_line(line: str | None) -> str:
    """``file.py:12`` of a source line."""
    return Path(line.partition(", in ")[0]).name if line else ""


def _others(rows: Sequence[Row]) -> str:
    """What the rows that are not shown do, in words."""
    kinds = Counter(
        row.kind if row.kind in ("absorbed", "removed") else _reason(row.rule) for row in rows
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _reason(rule: str) -> str:
    """The name of the reason for which a node stays."""
    reason = rule.partition(": ")[2].partition(": ")[0]
    return "results" if reason.startswith("one of the results") else reason


def _different_refusals(rows: Sequence[Row]) -> list[Row]:
    """One row for each message."""
    return list({row.rule: row for row in rows}.values())


def _refusal(row: Row) -> Text:
    return Text(f"\nrefused: {row.name}, ", "red").append(row.rule.partition(": ")[2], "default")
