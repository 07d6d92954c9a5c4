"""Search all ops and small models for a row whose bits change, for hours if need be."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bicompile.errors import PackageNotFound
from bicompile.machine import check_device

if TYPE_CHECKING:
    from bicompile.soak.state import Block, Failure, State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bicompile soak`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--cases", type=int, metavar="N", help="until the state holds so many")
    parser.add_argument("--minutes", type=float, metavar="M", help="for so long (default: 10)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)"
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep cases, go on from them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was done")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write it as a page")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these ops and models")
    parser.add_argument(
        "--load", nargs="+", default=[], metavar="MODULE", help="modules that register more ops"
    )
    parser.add_argument("--case", metavar="NAME@NUMBER", help="run one case again")


def run(args: argparse.Namespace) -> int:
    """Search; 1 if something was found."""
    _require()
    check_device(args.device)
    from bicompile.soak import page, subjects

    console = Console(highlight=False)
    if args.case:
        return _again(args, console)
    from bicompile.soak.state import State

    names = subjects.chosen(args.only, args.load)
    state = State(args.state, identity(args.device))
    start, before = time.perf_counter(), state.cases
    with contextlib.suppress(KeyboardInterrupt):
        _search(args, names, state, console)
    seconds = time.perf_counter() - start
    if args.json:
        args.json.write_text(json.dumps(state.summary(), indent=1, ensure_ascii=False) + "\n")
    if args.page:
        file = args.json.name if args.json else args.page.with_suffix(".json").name
        args.page.write_text(page.render(state.summary(), file))
    console.print(table(state))
    failures = state.failures()
    for failure in failures[:20]:
        console.print(_panel(failure))
    rate = (state.cases - before) / max(seconds, 1e-9)
    found = f"{len(failures)} differences" if failures else "no difference"
    console.print(f"{state.cases} cases, {found}; {rate:.0f} cases a second in this run")
    return int(bool(failures))


def _require() -> None:
    for package in ("pebble", "hypothesis"):
        try:
            __import__(package)
        except ImportError:
            need = "bicompile soak"
            raise PackageNotFound(package=package, need=need, extra="testing") from None


def _again(args: argparse.Namespace, console: Console) -> int:
    """Run the case that was named."""
    from bicompile.soak import subjects
    from bicompile.soak.state import Failure

    name, _, number = args.case.rpartition("@")
    subjects.chosen([name], args.load)
    law, message = subjects.check(name, int(number), args.device)
    if message:
        console.print(_panel(Failure(name, int(number), law, message)))
        return 1
    console.print(f"{args.case}: {law} holds")
    return 0


def identity(device: str) -> dict[str, str]:
    """What the result of a case depends on besides its number."""
    import torch

    from bicompile.backend import source_hash

    cuda = device == "cuda"
    chip = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": chip, "sources": source_hash()[:16]}


def _search(args: argparse.Namespace, names: list[str], state: State, console: Console) -> None:
    from bicompile.soak import work

    minutes = args.minutes if args.minutes or args.cases else 10.0
    end = time.perf_counter() + 60 * minutes if minutes else float("inf")
    wanted = args.cases or float("inf")
    if state.cases >= wanted:
        return
    tasks = itertools.takewhile(
        lambda _: time.perf_counter() < end and state.cases < wanted,
        work.endless(names, state.done(), args.device),
    )
    blocks = work.each(tasks, device=args.device, jobs=args.jobs, modules=args.load, end=end)
    with contextlib.closing(blocks), _bar(console, args.cases) as progress:
        for block in blocks:
            state.add(block)
            _show(progress, block, state, end)
            if time.perf_counter() >= end or state.cases >= wanted:
                return


@contextlib.contextmanager
def _bar(console: Console, total: int | None) -> Iterator[Progress]:
    columns = "{task.completed} cases", "{task.fields[rate]}", "{task.fields[what]}"
    left, rate, what = map(TextColumn, columns)
    with Progress(left, BarColumn(), rate, what, TimeElapsedColumn(), console=console) as progress:
        progress.add_task("", total=total, rate="", what="")
        yield progress


def _show(progress: Progress, block: Block, state: State, end: float) -> None:
    """Say how far the search is; what was found is told at once."""
    for failure in block.failures[:1]:
        progress.console.print(_panel(failure))
    (task,) = progress.tasks
    what = f"{block.subject}, {len(state.failures())} differences"
    progress.update(task.id, completed=state.cases, what=what)
    if speed := task.speed:
        progress.update(task.id, rate=f"{speed:.0f}/s")


def _panel(failure: Failure) -> Panel:
    title = f"{failure.subject}@{failure.number}: {failure.law}"
    return Panel(Text(failure.message), title=title, title_align="left", border_style="red")


def table(state: State) -> Table:
    """Cases and differences of each subject, and how many cases a process runs in a second."""
    found = Table("subject", "cases", "a second", "differences", title="soak")
    rates = state.rates()
    failures = [f.subject for f in state.failures()]
    for name, laws in sorted(state.counts().items()):
        count = failures.count(name)
        cells = str(sum(laws.values())), f"{rates[name]:.1f}", str(count)
        found.add_row(name, *cells, style="red" if count else None)
    return found
