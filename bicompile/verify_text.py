"""What `bicompile verify` found, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bicompile.sweep import Difference, Result


def show(console: Console, results: Sequence[Result]) -> None:
    """Print a line per bit class, then every schedule that is not in its class."""
    table = Table("family", "bit class", "schedules", "results of each", "", box=box.SIMPLE)
    for result in results:
        count = f"{len(result.members)} of {len(result.schedules)}"
        verdict = "[red]split[/]" if result.splits else "[green]equal bits[/]"
        table.add_row(
            result.family, result.bit_class, count, str(result.outcome.cases), verdict
        )  # fmt: skip
    console.print(table)
    for difference in (d for r in results for d in r.outcome.differences):
        console.print(escape(describe(difference)), soft_wrap=True)


def describe(difference: Difference) -> str:
    """A difference in words: the schedule, the call, the first element that differs."""
    fate = "is not in its class" if difference.runs else "does not run here"
    return (
        f"{difference.family}, {difference.bit_class}: {difference.schedule} {fate}\n"
        f"  {difference.problem}; {difference.call}\n  {difference.text}"
    )
