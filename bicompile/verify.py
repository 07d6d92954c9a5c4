"""Sweep the schedules of the GPU kernels on this machine and write its certificate."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bicompile import __version__, certificate
from bicompile.certificate import INTERPRETED, Certificate, Family, Listing, Machine, sources
from bicompile.errors import DamagedCertificate, GpuNotFound, SweepFailed
from bicompile.pool import gpu_is_lost, take_a_gpu
from bicompile.verify_text import show

if TYPE_CHECKING:
    from bicompile.sweep import BitClass, Depth, Outcome, Result

MEMORY_OF_A_JOB = 2 << 30
"""Bytes of GPU memory that a process may need, its context included."""
AT_ONCE = 8
"""Schedules that an item tries: each of them is compiled, which takes seconds."""


@dataclass(frozen=True)
class Item:
    """A part of a problem of a bit class, by number: what is sent to a process.

    `schedules`: those of the class that are tried besides the single one. `counts`: whether the
    results count, which others of the same part have too.
    """

    module: str
    depth: Depth
    bit_class: int
    problem: int
    part: int
    schedules: tuple[str, ...]
    counts: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    either("--quick", action="store_true", help="try a small part; writes no certificate")
    either("--output", type=Path, metavar="FOLDER", help="write the certificate there")
    add("--family", action="append", choices=sorted(modules()), help="only this one")
    add("--new", action="store_true", help="only schedules that the certificate does not list")
    add("--jobs", type=int, metavar="N", help="processes; one per core, if memory allows")
    add("--json", type=Path, metavar="FILE", help="write everything that was seen")


def run(args: argparse.Namespace) -> int:
    """Sweep; the exit status is 1 if a schedule of the tables is not in its class."""
    import torch

    from bicompile.sweep import Depth

    if not INTERPRETED and not torch.cuda.is_available():
        raise GpuNotFound()
    console = Console()
    machine = Machine.here(-1 if INTERPRETED else torch.cuda.current_device())
    depth = Depth.SMALL if INTERPRETED else Depth.QUICK if args.quick else Depth.FULL
    folder = args.output or certificate.USER
    kept = _kept(folder / machine.file, needed=bool(args.family or args.new))
    console.print(f"[dim]{escape(str(machine))}[/]")
    known = modules()
    chosen = [known[family] for family in dict.fromkeys(args.family or known)]
    jobs, start = args.jobs or default_jobs(), time.perf_counter()

    def write(results: Sequence[Result]) -> Path:
        return certify(results, machine, kept, args.new).write(folder)

    # A sweep that is stopped leaves the families that it has been through.
    done = None if args.quick else write
    results = sweep(chosen, depth, jobs, kept if args.new else {}, done)
    show(console, results)
    console.print(f"{jobs} processes, {time.perf_counter() - start:.0f} s")
    if args.json:
        about = {"machine": dataclasses.asdict(machine), "depth": depth.value}
        args.json.write_text(json.dumps(about | {"results": as_json(results)}, indent=1) + "\n")
    if args.quick:
        console.print("Nothing was written: a certificate needs the sweep without --quick.")
    else:
        console.print(f"Certificate: {write(results)}", soft_wrap=True)
    failures = [r.failure for r in results if r.failure]
    for failure in failures[1:]:
        console.print(escape(str(failure)), soft_wrap=True)
    if failures:
        raise failures[0]
    return 1 if any(r.splits or not r.members for r in results) else 0


def _kept(path: Path, needed: bool) -> Mapping[str, Family]:
    """What a certificate says of what is not swept this time, or not yet.

    A damaged one is an error where it is needed; a whole sweep replaces it.
    """
    with contextlib.nullcontext() if needed else contextlib.suppress(DamagedCertificate):
        return Certificate.read(path).families if path.exists() else {}
    return {}


def modules() -> dict[str, str]:
    """The modules that declare sweeps, by family."""
    files = sorted(certificate.KERNELS.glob("*/sweep.py"))
    return {f.parent.name: f"bicompile.kernels.{f.parent.name}.sweep" for f in files}


# ---------------------------------------------------------------------------------------- sweep


def sweep(
    names: Sequence[str],
    depth: Depth,
    jobs: int,
    kept: Mapping[str, Family] | None = None,
    done: Callable[[Sequence[Result]], object] | None = None,
) -> list[Result]:
    """Run all problems of some modules, each in one of `jobs` processes that share the GPUs.

    Of what is kept from a certificate of these sources, nothing is tried again; a class with
    nothing to try has no result. `done` is called with the results so far after each module.
    Most of the time goes into compiling kernels, on cores; a process compiles and runs its own. A
    kernel that does not compile or crashes ends the sweep of its bit class and of no other.
    """
    items = {name: list(_items(name, depth, kept or {})) for name in names}
    results: list[Result] = []

    def finish(name: str, tried: Mapping[Item, Outcome | SweepFailed]) -> None:
        results.extend(_results(name, depth, items[name], tried, kept or {}))
        if done:
            done(results)

    _try(items, jobs, finish)
    return results


def _results(
    name: str,
    depth: Depth,
    items: Sequence[Item],
    tried: Mapping[Item, Outcome | SweepFailed],
    kept: Mapping[str, Family],
) -> Iterator[Result]:
    """What came out of the bit classes of a module."""
    from bicompile.sweep import Outcome, Result, join

    found: dict[int, list[Outcome | SweepFailed]] = defaultdict(list)
    for item in items:
        outcome = tried[item]
        if isinstance(outcome, Outcome) and not item.counts:
            outcome = dataclasses.replace(outcome, cases=0)
        found[item.bit_class].append(outcome)
    for number, outcomes in found.items():
        c = _classes(name, depth)[number]
        c = _without(c, _listed(c, kept))
        schedules = tuple(map(repr, (c.single, *c.others)))
        failure = next((o for o in outcomes if isinstance(o, SweepFailed)), None)
        joined = join([o for o in outcomes if not isinstance(o, SweepFailed)])
        yield Result(c.family, c.name, schedules[0], schedules, joined, failure)


def _items(module: str, depth: Depth, kept: Mapping[str, Family]) -> Iterator[Item]:
    for i, bit_class in enumerate(_classes(module, depth)):
        listed = _listed(bit_class, kept)
        left = tuple(map(repr, _without(bit_class, listed).others))
        if listed and not left:
            continue
        for j, problem in enumerate(bit_class.problems):
            for part in range(problem.parts):
                for first in range(0, max(len(left), 1), AT_ONCE):
                    some = left[first : first + AT_ONCE]
                    yield Item(module, depth, i, j, part, some, counts=first == 0)


def _listed(bit_class: BitClass, kept: Mapping[str, Family]) -> tuple[str, ...]:
    """The schedules of a class that a certificate of these sources lists."""
    family = kept.get(bit_class.family)
    if family is None or family.sources != sources(bit_class.family):
        return ()
    listing = family.classes.get(bit_class.name)
    return listing.schedules if listing else ()


def _without(bit_class: BitClass, listed: Sequence[str]) -> BitClass:
    """A class of the schedules that are not listed; the single one stays, to compare with."""
    left = [s for s in bit_class.others if repr(s) not in listed]
    return dataclasses.replace(bit_class, schedules=[bit_class.single, *left])


def _try(
    items: Mapping[str, Sequence[Item]],
    jobs: int,
    finish: Callable[[str, Mapping[Item, Outcome | SweepFailed]], None],
) -> None:
    """Try the items of all modules, one module after the other; `finish` is told of each.

    A bar lives while they come in. What was left when a process died, or had lost the GPU, others
    try again, at last one by one.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(file=sys.stderr)
    every = [item for some in items.values() for item in some]
    found: dict[Item, Outcome | SweepFailed] = {}
    left = {name: len(some) for name, some in items.items()}
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(f"problems, {jobs} processes", total=len(every))

        def keep(item: Item, outcome: Outcome | SweepFailed | None) -> None:
            if outcome is None:
                return
            found[item] = outcome
            progress.advance(task)
            left[item.module] -= 1
            if not left[item.module]:
                finish(item.module, found)

        if jobs == 1:
            for item in every:
                keep(item, work(item))
        before = -1
        while missing := [i for i in every if i not in found]:
            # Neighbours need the same kernels: side by side, each process would compile them.
            random.Random(0).shuffle(missing)
            missing.sort(key=lambda item: [*items].index(item.module))
            together = len(found) > before
            before = len(found)
            for some in [missing] if together else [[i] for i in missing]:
                _try_once(some, jobs, keep)
            if not together:
                break
        for item in every:
            if item not in found:
                keep(item, SweepFailed(problem=_where(item), output="its process died"))


def _try_once(items: Sequence[Item], jobs: int, keep: Callable[..., None]) -> None:
    """Hand each item to one of `jobs` processes, as long as none of them dies."""
    context = multiprocessing.get_context("spawn")  # a forked process has no working CUDA
    begun = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(begun,)) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    keep(futures[future], future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(begun: Any) -> None:
    """Make a process ready; `begun` counts them."""
    import torch

    torch.set_num_threads(1)
    if not INTERPRETED:
        take_a_gpu(begun)


def work(item: Item) -> Outcome | SweepFailed | None:
    """Run a part of a problem; called in a process of the sweep. None: it has no GPU any more."""
    from bicompile.sweep import check

    if not INTERPRETED and gpu_is_lost():
        return None
    bit_class = _classes(item.module, item.depth)[item.bit_class]
    tried = [s for s in bit_class.others if repr(s) in item.schedules]
    bit_class = dataclasses.replace(bit_class, schedules=[bit_class.single, *tried])
    problem = bit_class.problems[item.problem]
    try:
        return check(bit_class, problem, "cpu" if INTERPRETED else "cuda", item.part)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[-4000:]
        return SweepFailed(problem=_where(item), output=text)


def _where(item: Item) -> str:
    bit_class = _classes(item.module, item.depth)[item.bit_class]
    return f"{bit_class.family}, {bit_class.name}, {bit_class.problems[item.problem].name}"


@functools.cache
def _classes(module: str, depth: Depth) -> list[BitClass]:
    from bicompile.sweep import classes

    return classes(module, depth)


def default_jobs() -> int:
    """A process per core, as far as the memory of the GPU goes; one in the interpreter."""
    if INTERPRETED:
        return 1
    import torch

    free, _ = torch.cuda.mem_get_info()
    return max(1, min(len(os.sched_getaffinity(0)), free // MEMORY_OF_A_JOB))


# --------------------------------------------------------------------------------------- results


def certify(
    results: Sequence[Result], machine: Machine, kept: Mapping[str, Family] | None = None,
    new: bool = False,
) -> Certificate:  # fmt: skip
    """The certificate of what a sweep found, and of what is kept from another.

    Families that were not swept are kept; if only `new` schedules were, those of their classes that
    were listed before too, where the single schedule has the bits that it had.
    """
    families = dict(kept or {})
    by_family = itertools.groupby(results, key=lambda r: r.family)
    for family, found in by_family:
        before = families.get(family)
        same = new and before is not None and before.sources == sources(family)
        listed = dict(before.classes) if before and same else {}
        for r in found:
            seen = listed.pop(r.bit_class, None)
            members = r.members
            if seen and (r.failure or (members and seen.digest == r.outcome.digest)):
                listed[r.bit_class] = dataclasses.replace(
                    seen, schedules=tuple(dict.fromkeys(seen.schedules + members))
                )
            elif members:
                listed[r.bit_class] = Listing(members, r.outcome.cases, r.outcome.digest)
        families[family] = Family(sources(family), listed)
    return Certificate(machine, families, _notes())


def _notes() -> dict[str, str]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r" (\d+\.[\d.]+) ", driver.read_text()) if driver.exists() else None
    return {
        "bicompile": __version__,
        "driver": version[1] if version else "unknown",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def as_json(results: Sequence[Result]) -> Any:
    """All results as data."""
    return [dataclasses.asdict(r) | {"members": r.members} for r in results]
