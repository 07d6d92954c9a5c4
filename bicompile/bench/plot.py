"""Draws the ratios of a file of the bench over the batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bicompile.bench.results import Report, Row, bases
from bicompile.errors import UnsafeSetting
from bicompile.machine import title

Line = list[tuple[int, float]]


def draw(file: Path, target: Path) -> None:
    """Draw a file of the bench as SVG; the drawing names the file's hash.

    Raises:
        UnsafeSetting: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsafeSetting(
            setting="--page",
            value=target,
            reason="matplotlib, which draws it, is not installed",
            accepted=["the extra `bench`"],
            todo='run: pip install "bicompile[bench]"',
        ) from error
    report = Report.load(file)
    drawn = panels(report.tables)
    # The same file gives the same drawing, byte by byte.
    with matplotlib.rc_context({"svg.hashsalt": "bicompile", "svg.fonttype": "none"}):
        figure: Any = Figure(figsize=(10, 3.4 * len(drawn)), layout="constrained")
        figure.suptitle(title(report.machine), fontsize=10)
        for axes, (name, lines) in zip(
            figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn.items(), strict=True
        ):
            _panel(axes, name, lines)
        figure.savefig(target, metadata={"Date": None, "Description": identity(file)})


def identity(file: Path) -> str:
    """What stands in the drawing of a file."""
    return f"drawn from {file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


def panels(tables: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Line]]:
    """Panel -> group -> (batch, ratio to the best other system); matmuls have a panel of theirs."""
    drawn: dict[str, dict[str, Line]] = {}
    for name, rows in tables.items():
        rivals = [base for base in bases(rows) if base != "limit"]
        for row in rows:
            case, ratio = row.case, row.ratio(*rivals)
            if case is not None and ratio is not None:
                panel = f"{name}: matmuls" if case.kind == "mm" else name
                line = drawn.setdefault(panel, {}).setdefault(case.group, [])
                line.append((case.batch, ratio))
    return drawn


def _panel(axes: Any, name: str, lines: Mapping[str, Line]) -> None:
    axes.axhline(1, color="black", linewidth=0.8)
    for i, (group, points) in enumerate(lines.items()):
        batches, ratios = zip(*points, strict=True)
        axes.plot(batches, ratios, marker="os^Dv"[i // 10 % 5], color=f"C{i % 10}", label=group)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{name}: time of bicompile / the best other", fontsize=9)
    axes.set_xlabel("batch (sequences or rows)", fontsize=8)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
