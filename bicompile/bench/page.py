"""Writes docs/performance.md and its plots from the files of the bench."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bicompile.bench import plot
from bicompile.bench.cases import OURS
from bicompile.bench.results import BETTER, Report, Row, bases, summary
from bicompile.errors import UnsafeSetting
from bicompile.machine import title

HEADER = """# Performance

Written by `{command}`; a test compares it with the files that it names.

""" + " ".join(
    (
        "Ratios are times of bicompile divided by those of another system: below 1, bicompile is",
        "faster. Each system runs in a process of its own; the processes take turns, and the",
        "fastest of all rounds counts. A time is there only if the bits held: the rows that two",
        "batches share were compared before. What is timed, and how, is in [demo.md](demo.md).\n",
    )
)
LIMIT = " ".join(
    (
        "\n`limit` is the physical limit of this machine for the model, as measured in that run:",
        "{rates}. Weights and visible keys and values move once, activations not at all.\n",
    )
)


def write(path: Path, files: Sequence[Path]) -> None:
    """Write the page, and a plot beside it for each file that has several batch sizes.

    Raises:
        UnsafeSetting: no such files are named.
    """
    absent = [str(f) for f in files if not f.is_file()]
    if absent or not files:
        raise UnsafeSetting(
            setting="--page",
            value=path,
            reason=f"there is no {' '.join(absent)}" if absent else "no file of the bench follows",
            accepted=["the page, then at least one file that --json wrote"],
            todo="name the files",
        )
    for file in files:
        if plot.panels(Report.load(file).tables):
            plot.draw(file, plot_of(path, file))
    path.write_text(render(path, files))


def plot_of(path: Path, file: Path) -> Path:
    """Where the plot of a file lies: beside the page."""
    return path.with_name(file.stem + ".svg")


def render(path: Path, files: Sequence[Path]) -> str:
    """The text of the page."""
    command = " ".join(["bicompile bench --page", path.as_posix(), *(f.as_posix() for f in files)])
    parts = [HEADER.format(command=command)]
    for file in files:
        parts += _machine(path, file, Report.load(file))
    return "\n".join(parts)


def _machine(path: Path, file: Path, report: Report) -> Iterator[str]:
    """The section of one file."""
    where = os.path.relpath(file, path.parent)
    found = report.machine
    versions = ", ".join(f"{n} {found[n]}" for n in ("triton", "transformers", "python"))
    yield f"## {title(found)}\n"
    yield f"Suite `{report.suite}`, {versions}; all figures: [{file.name}]({where}).\n"
    yield "\n".join(["```sh", *report.commands, "```\n"])
    if plot.panels(report.tables):
        yield f"![ratios by batch size]({plot_of(path, file).name})"
    if report.limits:
        rates = (
            f"{r['bytes'] / 1e12:.3g} TB/s copied, {r['operations'] / 1e12:.3g} TFLOP/s in {dtype}"
            for dtype, r in report.limits.items()
        )
        yield LIMIT.format(rates="; ".join(rates))
    yield "\n### Geometric mean and worst ratio\n\n" + _summary(report)
    if any(r.base == BETTER for r in summary(report.tables)):
        yield f"{BETTER}: case by case, the faster mode of default `torch.compile`.\n"
    for name, rows in report.tables.items():
        if not name.startswith("ops"):
            yield f"### {name[0].upper()}{name[1:]}\n\n" + _rows(rows)


def _summary(report: Report) -> str:
    lines = ["| | against | cases | mean | worst | where |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {r.table}: {r.what} | {r.base} | {r.cases} | {r.mean:.2f} | {r.worst:.2f} "
        f"| {r.worst_case} |"
        for r in summary(report.tables)
    ]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Row]) -> str:
    others = bases(rows)
    rivals = [s for s in others if s != "limit"]
    head = [*others, OURS, "ratio" if len(rivals) == 1 else "ratio to the better"]
    head += ["ratio to the limit"] if "limit" in others else []
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "--:|" * len(head)]
    for row in rows:
        cells = [_figure(row, system) for system in (*others, OURS)]
        cells += [_ratio(row.ratio(*rivals))]
        cells += [_ratio(row.ratio("limit"))] if "limit" in others else []
        lines.append(f"| {row.what} ({row.unit}) | " + " | ".join(cells) + " |")
    lines += [f"\n{row.what}, {s}: {why}" for row in rows for s, why in row.missing.items()]
    return "\n".join(lines) + "\n"


def _figure(row: Row, system: str) -> str:
    if system not in row.figures:
        return "-"
    figure = row.figures[system]
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
