"""Race against default torch.compile: a real model and single ops, with their bits checked."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bicompile.bench_worker import Case

MODEL_CASES = (
    Case("prefill", 1),
    Case("decode", 1),
    Case("prefill", 4),
    Case("decode", 4),
    Case("decode", 16),
)
FIRST_ANSWER = MODEL_CASES[:2]
OP_CASES = tuple(
    Case(group, batch)
    for group, batches in {
        "mm 576x1536": (1, 16, 128),
        "mm 1536x576": (1, 16, 128),
        "mm 576x49152": (1, 4),
        "decode 9x3x512x64": (1, 4, 16),
        "prefill 9x3x128x64": (1, 4),
        "rms_norm 576": (1, 128),
        "layer_norm 576": (1, 128),
        "softmax 2048": (1, 128),
    }.items()
    for batch in batches
)
BASE, OURS = "inductor", "bicompile"
_CALLS = {"model": 5, "ops": 30}


class WorkerFailed(Exception):
    """A worker process reported an error or died."""


@dataclass(frozen=True)
class Row:
    """One line of the result: what was measured, and the figure of each system."""

    what: str
    unit: str
    figures: dict[str, float]
    note: str = ""

    def ratio(self, base: str) -> float | None:
        """Ours divided by `base`, or None where one of them is missing."""
        if base not in self.figures or OURS not in self.figures:
            return None
        return self.figures[OURS] / self.figures[base]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--model", metavar="ID_OR_FOLDER", help="instead of SmolLM2-135M-Instruct")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, metavar="1", help="CPU threads of each system")
    add("--dtype", choices=("bfloat16", "float32", "float16"), action="append")
    add("--mode", choices=("reduce-overhead",), help="mode of torch.compile, for both systems")
    add("--only", choices=("model", "ops"), help="leave out the other half")
    add("--rounds", type=int, default=7, metavar="7", help="interleaved rounds")
    add("--quick", action="store_true", help="bfloat16 only, 3 rounds, fewer cases")
    add("--json", type=Path, metavar="FILE", help="write all figures, machine and versions")


def run(args: argparse.Namespace) -> int:
    """Run the bench; the exit status is 0 only if our bits held everywhere."""
    from bicompile import models
    from bicompile.machine import check_device, machine, title

    check_device(args.device)
    console, progress = Console(), Console(file=sys.stderr)
    if args.only != "ops" and args.model is None:
        models.unpack(models.fetch(console=progress), console=progress)
    found = machine(args.device) | {"threads": args.threads}
    console.print(f"[dim]{escape(title(found))}[/]")
    dtypes = args.dtype or (["bfloat16"] if args.quick else ["bfloat16", "float32"])
    rows: dict[str, list[Row]] = {}
    for kind in ("model", "ops"):
        for dtype in dtypes if args.only in (None, kind) else ():
            settings = {
                "kind": kind,
                "dtype": dtype,
                **{k: getattr(args, k) for k in ("model", "device", "threads", "mode")},
            }
            name = f"{kind}, {dtype}"
            rows[name] = []
            try:
                for row in measure(settings, args.rounds, args.quick, progress):
                    rows[name].append(row)
            except WorkerFailed as error:
                rows[name].append(Row("the rest", "", {}, str(error)))
            _show(console, name, rows[name])
    if args.json:
        tables = {name: [asdict(row) for row in table] for name, table in rows.items()}
        report = {"machine": found, "rounds": args.rounds, "mode": args.mode, "tables": tables}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(row.note for table in rows.values() for row in table) else 0


def measure(
    settings: Mapping[str, Any], rounds: int, quick: bool, console: Console
) -> Iterator[Row]:
    """All figures of one kind and dtype."""
    kind = settings["kind"]
    cases = MODEL_CASES if kind == "model" else OP_CASES
    if quick:
        rounds = min(rounds, 3)
        cases = tuple(c for c in cases if c.batch in (1, 4))
    systems = (BASE, OURS) if kind == "model" else ("eager", BASE, OURS)
    with ExitStack() as stack:
        caches = {s: stack.enter_context(tempfile.TemporaryDirectory()) for s in systems}
        with ExitStack() as alive:
            workers: dict[str, Worker] = {}
            compiled: dict[str, list[float]] = {}
            broken: dict[str, str] = {}
            for system in systems:
                try:
                    with console.status(f"{settings['dtype']} {kind}: compiling {system}"):
                        worker = Worker({**settings, "system": system}, caches[system])
                        workers[system] = alive.enter_context(worker.running())
                        compiled[system] = [workers[system].ask("first", c) for c in cases]
                except WorkerFailed as error:
                    broken[system] = str(error)
                    workers.pop(system, None)
            if kind == "model":
                first = {s: sum(v[: len(FIRST_ANSWER)]) for s, v in compiled.items()}
                every = {s: sum(v) for s, v in compiled.items()}
                yield Row("compile, first answer", "s", first, broken.get(OURS, ""))
                yield Row("compile, all cases", "s", every)
            if OURS in workers:
                wrong = check_bits(workers[OURS], cases)
            else:
                wrong = {case.group: broken[OURS] for case in cases}
            with console.status(f"{settings['dtype']} {kind}: {rounds} rounds"):
                yield from race(workers, cases, rounds, _CALLS[kind], wrong)
        if kind == "model":
            with console.status(f"{settings['dtype']} {kind}: second process"):
                yield from second_process(settings, [s for s in systems if s in compiled], caches)


def check_bits(worker: Worker, cases: Sequence[Case]) -> dict[str, str]:
    """Compare the rows that cases of one group share; returns the groups that failed and how."""
    seen: dict[str, list[str]] = {}
    wrong: dict[str, str] = {}
    for case in cases:
        rows = worker.ask("digests", case)
        known = seen.setdefault(case.group, rows)
        if any(a != b for a, b in zip(known, rows, strict=False)):
            wrong[case.group] = f"bits of a row differ at batch {case.batch}"
        if len(rows) > len(known):
            seen[case.group] = rows
    return wrong


def race(
    workers: Mapping[str, Worker],
    cases: Sequence[Case],
    rounds: int,
    calls: int,
    wrong: Mapping[str, str],
) -> Iterator[Row]:
    """Time the systems in turn, round after round, and keep each one's fastest call.

    A system whose bits are wrong gets no time.
    """
    for case in cases:
        best: dict[str, float] = {}
        racers = {s: w for s, w in workers.items() if s != OURS or case.group not in wrong}
        for _ in range(rounds):
            for system, worker in racers.items():
                seconds = worker.ask("measure", case, calls=calls)
                best[system] = min(best.get(system, seconds), seconds)
        milliseconds = {s: v * 1e3 for s, v in best.items()}
        yield Row(case.name, "ms", milliseconds, wrong.get(case.group, ""))


def second_process(
    settings: Mapping[str, Any], systems: Sequence[str], caches: Mapping[str, str]
) -> Iterator[Row]:
    """Start again with warm caches: seconds to the first answer, and peak memory."""
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for system in systems:
        with Worker({**settings, "system": system}, caches[system]).running() as worker:
            seconds[system] = sum(worker.ask("first", c) for c in FIRST_ANSWER)
            memory[system] = worker.ask("memory", FIRST_ANSWER[0])
    yield Row("second process, first answer", "s", seconds)
    yield Row("second process, peak memory", "MB", memory)


class Worker:
    """The other end of `bicompile.bench_worker`: one process with one system."""

    def __init__(self, settings: Mapping[str, Any], cache: str) -> None:
        self.settings = dict(settings)
        self.cache = cache
        self.process: subprocess.Popen[str] | None = None

    @contextmanager
    def running(self) -> Iterator[Worker]:
        """Start the process, and end it afterwards.

        Raises:
            WorkerFailed: it could not load the model or the system.
        """
        command = [sys.executable, "-m", "bicompile.bench_worker", json.dumps(self.settings)]
        threads = str(self.settings["threads"])
        environment = {"TORCHINDUCTOR_CACHE_DIR": self.cache, "OMP_NUM_THREADS": threads}
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(
                command,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment,
            )
            try:
                self._reply()
                yield self
            finally:
                self.process.kill()
                self.process.communicate()

    def ask(self, do: str, case: Case, **more: Any) -> Any:
        """Send one request and wait for its answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        request = {"do": do, "case": [case.group, case.batch], **more}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerFailed(f"{self.settings['system']} died") from error
        return self._reply()

    def _reply(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the process died"}
        if isinstance(reply, dict):
            raise WorkerFailed(f"{self.settings['system']}: {reply['error']}")
        return reply


def _show(console: Console, name: str, rows: Sequence[Row]) -> None:
    systems = [s for s in ("eager", BASE, OURS) if any(s in row.figures for row in rows)]
    bases = [s for s in systems if s != OURS]
    title = f"{name} (a ratio below 1: bicompile takes less)"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for system in systems:
        table.add_column(system, justify="right")
    for base in bases:
        table.add_column(f"/{base}", justify="right")
    for row in rows:
        figures = [f"{row.figures[s]:.3g}" if s in row.figures else "-" for s in systems]
        ratios = [row.ratio(b) for b in bases]
        shown = [f"[bold]{r:.2f}[/]" if r is not None else "-" for r in ratios]
        short = row.what.replace(" batch ", " B=")  # eighty columns
        table.add_row(f"{short} ({row.unit})", *figures, *shown)
    console.print(table)
    for note in dict.fromkeys(f"{row.what}: {row.note}" for row in rows if row.note):
        console.print(f"[red]{escape(note)}[/]")
