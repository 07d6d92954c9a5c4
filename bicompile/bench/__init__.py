"""Race against default torch.compile: models, their training, ops and many requests, bits first."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from bicompile.bench.cases import OURS, SUITES
from bicompile.bench.results import Report, Row
from bicompile.errors import UnsafeSetting

PARTS = ("model", "ops", "sequences", "training")
_DEFAULT_SUITE = {"cpu": "small", "cuda": "qwen3-8b"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--suite", choices=tuple(SUITES), help="what is timed; small on a CPU, qwen3-8b on a GPU")
    add("--model", metavar="ID_OR_FOLDER", help="of suite small, instead of SmolLM2-135M-Instruct")
    add("--threads", type=int, default=1, metavar="1", help="CPU threads of each system")
    add("--dtype", choices=("bfloat16", "float32", "float16"), action="append")
    add("--only", choices=PARTS, action="append", help="leave out the rest")
    add("--rounds", type=int, metavar="7", help="interleaved rounds")
    add("--quick", action="store_true", help="bfloat16, 3 rounds, fewer cases, smaller models")
    add("--json", type=Path, metavar="FILE", help="written after each row; goes on with the file")
    add("--page", nargs="+", type=Path, metavar="FILE", help="PAGE JSON...: only write the page")


def run(args: argparse.Namespace) -> int:
    """Run the bench; the exit status is 0 only if our bits held everywhere."""
    if args.page:
        from bicompile.bench import page

        page.write(args.page[0], args.page[1:])
        return 0
    from bicompile.bench import tables
    from bicompile.machine import check_device, machine, title

    check_device(args.device)
    console = Console()
    suite = SUITES[args.suite or _DEFAULT_SUITE[args.device]][args.quick]
    found = machine(args.device) | {"threads": args.threads}
    report = Report.open(args.json, suite.name, found)
    report.note(command(args))
    console.print(f"[dim]{escape(title(found))}, suite {suite.name}[/]")
    names: list[str] = []
    progress, start = Console(file=sys.stderr), time.monotonic()
    for name, rows in _tables(args, suite, report, progress):
        report.start(name)
        for row in rows:
            report.add(name, row)
            progress.print(f"[dim]{time.monotonic() - start:4.0f} s  {name}: {row.what}[/]")
        tables.show(console, name, report.tables[name])
        names.append(name)
    made = {name: report.tables[name] for name in names}
    tables.show_summary(console, made)
    return 1 if any(OURS in row.missing for table in made.values() for row in table) else 0


def _tables(
    args: argparse.Namespace, suite: Any, report: Report, progress: Console
) -> Iterator[tuple[str, Iterator[Row]]]:
    """The name and the rows of each table that is asked for."""
    from bicompile import models
    from bicompile.bench import race

    parts = _parts(args, suite)
    if {"model", "training"} & set(parts) and suite.shapes is None and args.model is None:
        models.unpack(models.fetch(console=progress), console=progress)
    for dtype in _dtypes(args):
        for part in parts:
            course = race.Race(
                part,
                dtype,
                args.device,
                suite,
                rounds=args.rounds or (3 if args.quick else 7),
                threads=args.threads,
                model=args.model,
                debug=args.debug,
            )
            name = f"{part}, {dtype}"
            if part == "ops":
                yield name, race.ops(course, progress)
            elif part == "sequences":
                yield name, race.sequences(course, progress)
            elif part == "training":
                yield name, race.training(course, progress)
            else:
                if suite.shapes is not None:
                    report.limits[dtype] = race.measure_limits(course)
                yield name, race.models(course, report.limits.get(dtype), progress)


def _dtypes(args: argparse.Namespace) -> list[str]:
    both = args.device == "cpu" and not args.quick
    return args.dtype or (["bfloat16", "float32"] if both else ["bfloat16"])


def _parts(args: argparse.Namespace, suite: Any) -> tuple[str, ...]:
    """The parts of the bench to run, in their order.

    Raises:
        UnsafeSetting: an option asks for what the suite does not have.
    """
    name = suite.name.partition(",")[0]
    if args.model and suite.shapes is not None:
        raise UnsafeSetting(
            setting="--model",
            value=args.model,
            reason=f"the model of suite {name} has random weights",
            accepted=["no --model", "--suite small"],
            todo="add --suite small, or leave out --model",
        )
    if args.only and "sequences" in args.only and suite.sequences is None:
        raise UnsafeSetting(
            setting="--only",
            value="sequences",
            reason=f"suite {name} has none",
            accepted=[n for n, (whole, _) in SUITES.items() if whole.sequences],
            todo="name one of these suites with --suite",
        )
    had = [part for part in PARTS if part != "sequences" or suite.sequences]
    return tuple(part for part in had if not args.only or part in args.only)


def command(args: argparse.Namespace) -> str:
    """The command line that gives these arguments, for the report."""
    defaults: dict[str, Any] = {"device": "cpu", "threads": 1}
    words = ["bicompile", "bench"]
    for name in ("device", "suite", "model", "threads", "dtype", "only", "rounds", "json"):
        value = getattr(args, name)
        if value is not None and value != defaults.get(name):
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{name}", str(one)]
    return shlex.join([*words, *(["--quick"] if args.quick else [])])
