"""The tables of the bench as the terminal shows them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bicompile.bench.cases import OURS
from bicompile.bench.results import Row, bases, summary


def show(console: Console, name: str, rows: Sequence[Row]) -> None:
    """All rows of one table, ops by the systems they are raced with; why figures are missing."""
    parts = [list(part) for _, part in itertools.groupby(rows, _rivals(rows))]
    for part in parts if name.startswith("ops") else [rows]:
        console.print(_figures(name, part))
    for system in dict.fromkeys(s for row in rows for s in row.missing):
        colour = "red" if system == OURS else "dim"
        for row in rows:
            if system in row.missing:
                text = escape(f"{row.what}, {system}: {row.missing[system]}")
                console.print(f"[{colour}]{text}[/]")


def _rivals(rows: Sequence[Row]) -> Callable[[Row], list[str]]:
    """The systems that any row of the same kind has a figure of."""

    def kind(row: Row) -> str:
        return row.what.partition(" ")[0]

    return lambda row: bases([other for other in rows if kind(other) == kind(row)])


def _figures(name: str, rows: Sequence[Row]) -> Table:
    systems = [*bases(rows), OURS]
    rivals = [s for s in systems if s not in (OURS, "limit")]
    compared = {"ratio": rivals} | ({"/limit": ["limit"]} if "limit" in systems else {})
    table = _table(f"{name} (ratio to the best other; below 1, bicompile takes less)")
    table.add_column("", no_wrap=True)
    for column in (*systems, *compared):
        table.add_column(column.replace("-", "-\n"), justify="right", no_wrap=True)
    for row in rows:
        figures = [f"{row.figures[s]:.3g}" if s in row.figures else "-" for s in systems]
        ratios = [row.ratio(*base) for base in compared.values()]
        shown = [f"[bold]{r:.2f}[/]" if r is not None else "-" for r in ratios]
        table.add_row(f"{_short(row.what)} ({row.unit})", *figures, *shown)
    return table


def _short(what: str) -> str:
    return what.replace(" batch ", " B=")  # eighty columns


def show_summary(console: Console, tables: Mapping[str, Sequence[Row]]) -> None:
    """Geometric mean and worst ratio of each family of cases."""
    table = _table("bicompile / base: geometric mean and worst")
    for column in ("", "base", "cases", "mean", "worst", "at"):
        table.add_column(column, justify="left" if column in ("", "base", "at") else "right")
    for r in summary(tables):
        name = f"{r.table.partition(',')[0]}: {r.what}"
        table.add_row(
            name, r.base, f"{r.cases}", f"{r.mean:.2f}", f"{r.worst:.2f}", _short(r.worst_case)
        )
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
