"""Classify every operation that PyTorch knows, and check a zoo of models, by running them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bicompile import pool
from bicompile.coverage.results import (
    CLASSES,
    FAILED,
    UNUSED,
    ModelResult,
    OnGpu,
    OpResult,
    Results,
    first_line,
)
from bicompile.errors import BicompileError, CoverageUnavailable
from bicompile.machine import check_device, machine, title
from bicompile.report import Verdict

SECONDS = 900.0
"""After which an operation or a model is given up."""
TASKS = 60
"""A process is replaced after so many: compiled code stays in its memory."""
CHECKED = ("float32", "bfloat16")
"""Dtypes in which operations are compiled and run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bicompile coverage`."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: run again on a GPU what FILE says holds on the CPU",
    )
    parser.add_argument("--ops", action="store_true", help="operations (default: both)")
    parser.add_argument("--models", action="store_true", help="models (default: both)")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="these alone; the others stay as FILE has them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write results as they come, to be continued"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what FILE has")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page")


def run(args: argparse.Namespace) -> int:
    """Run what was asked for, write it down, print the counts; 1 if something failed there."""
    _require()
    check_device(args.device)
    on_gpu = args.device == "cuda"
    keep = args.json and (args.resume or args.only is not None or on_gpu)
    results = Results.load(args.json) if keep else Results()
    console = Console(highlight=False)
    for stage in (_ops_on_gpu, _models_on_gpu) if on_gpu else (_judge, _check, _models):
        stage(args, results, console)
    if args.page:
        from bicompile.coverage import page

        args.page.write_text(page.render(results))
    return _print(results, console, on_gpu)


def _require() -> None:
    try:
        import expecttest  # noqa: F401
        import pebble  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise CoverageUnavailable(missing=error.name) from error


def _judge(args: argparse.Namespace, results: Results, console: Console) -> None:
    """The graphs of all operations, without compiling them."""
    from bicompile.coverage import ops

    names = [n for n in ops.names() if _wanted(n, args.ops, args, n in results.ops)]
    for (name,), found in _each(args, console, "judge", ops.judge, [(n,) for n in names]):
        failed = isinstance(found, BaseException)
        results.ops[name] = {"float32": OpResult(FAILED)} if failed else found
        if failed:
            results.ops[name]["float32"].fail(first_line(found))
        _keep(args, results)


def _check(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Compiled code of all operations, those with kernels of ours and float32 first."""
    from bicompile.coverage import ops

    tasks = [
        (name, dtype, found.sample)
        for dtype in CHECKED
        for name, by_dtype in sorted(results.ops.items(), key=lambda item: not _owned(item[1]))
        if (found := by_dtype.get(dtype)) and found.sample is not None
        if _wanted(name, args.ops, args, found.checks is not None)
    ]
    for (name, dtype, _), found in _each(args, console, "check", ops.check, tasks):
        result = results.ops[name][dtype]
        result.checks = [] if isinstance(found, BaseException) else found
        if isinstance(found, BicompileError):  # of another size, or of any size
            result.refuse(first_line(found))
        elif isinstance(found, BaseException):
            result.fail(f"compiled code: {first_line(found)}")
        _keep(args, results)


def _owned(by_dtype: dict[str, OpResult]) -> bool:
    return any(found.kernels for found in by_dtype.values())


def _models(args: argparse.Namespace, results: Results, console: Console) -> None:
    """The models of the zoo."""
    from bicompile.coverage import models
    from bicompile.coverage.zoo import ZOO

    names = [n for n in ZOO if _wanted(n, args.models, args, n in results.models)]
    for (name,), found in _each(args, console, "model", models.check, [(n,) for n in names]):
        if isinstance(found, BaseException):
            found = ModelResult(ZOO[name].kind, FAILED, reason=first_line(found))
        results.models[name] = found
        _keep(args, results)


def _ops_on_gpu(args: argparse.Namespace, results: Results, console: Console) -> None:
    """The samples that hold on the CPU, on a GPU; those with kernels of ours first."""
    from bicompile.coverage import ops

    results.gpu = title(machine("cuda"))
    tasks = [
        (name, dtype, found.sample, "cuda")
        for dtype in CHECKED
        for name, by_dtype in sorted(results.ops.items(), key=lambda item: not _owned(item[1]))
        if (found := by_dtype.get(dtype)) and found.checks
        if _wanted(name, args.ops, args, found.gpu is not None)
    ]
    for (name, dtype, *_), found in _each(args, console, "check", ops.check, tasks):
        results.ops[name][dtype].gpu = _on_gpu(found)
        _keep(args, results)


def _models_on_gpu(args: argparse.Namespace, results: Results, console: Console) -> None:
    """The models that hold on the CPU, on a GPU."""
    from bicompile.coverage import models

    tasks = [
        (name, "cuda")
        for name, found in results.models.items()
        if found.verdict not in (FAILED, Verdict.REFUSED.value)
        if _wanted(name, args.models, args, found.gpu is not None)
    ]
    for (name, _), found in _each(args, console, "model", models.check, tasks):
        if isinstance(found, ModelResult):
            found = OnGpu(found.verdict, found.checks, found.reason)
        results.models[name].gpu = _on_gpu(found)
        _keep(args, results)


def _on_gpu(found: OnGpu | list[str] | BaseException) -> OnGpu:
    """What a check of a sample or a model returned or raised."""
    from bicompile.coverage.checks import NotThere

    if isinstance(found, NotThere):
        return OnGpu(UNUSED, reason=first_line(found))
    if isinstance(found, BaseException):
        refused = isinstance(found, BicompileError)
        return OnGpu(Verdict.REFUSED.value if refused else FAILED, reason=first_line(found))
    return found if isinstance(found, OnGpu) else OnGpu(checks=found)


def _wanted(name: str, part: bool, args: argparse.Namespace, known: bool) -> bool:
    """Whether a task belongs to what was asked for; `part` and its opposite are the two halves."""
    if not part and args.ops != args.models:
        return False
    if args.only is not None:
        return name in args.only
    return not (known and args.resume)


def _each(
    args: argparse.Namespace,
    console: Console,
    what: str,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What the function says of each task, under a bar; what was raised is told at once."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task(what, total=len(tasks))
        given = {"jobs": args.jobs, "seconds": SECONDS, "most": TASKS, "device": args.device}
        for task, found in pool.each(function, tasks, **given):
            named = " ".join([what, *map(str, task)])
            progress.update(bar, advance=1, description=named)
            if isinstance(found, BaseException):
                console.print(f"{named}: {first_line(found)}", style="red", markup=False)
            yield task, found


def _keep(args: argparse.Namespace, results: Results) -> None:
    if args.json:
        results.save(args.json)


def _print(results: Results, console: Console, on_gpu: bool) -> int:
    counted = {
        "operations": Counter(results.verdict(name) for name in results.ops),
        "models": Counter(found.verdict for found in results.models.values()),
        "operations on a GPU": Counter(v for n in results.ops if (v := results.on_gpu(n))),
        "models on a GPU": Counter(m.gpu.verdict for m in results.models.values() if m.gpu),
    }
    for what, counts in counted.items():
        if counts:
            told = [f"{c} {counts[c]}" for c in CLASSES]
            told += [f"{c} {n}" for c, n in counts.items() if c not in CLASSES]
            console.print(f"{counts.total()} {what}: {', '.join(told)}")
    there = (c for what, c in counted.items() if what.endswith(" on a GPU") == on_gpu)
    return int(any(counts[FAILED] for counts in there))
