"""The course of a race: compile, compare the bits, take turns; yields one row after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from bicompile.bench.cases import (
    OURS,
    SYSTEMS,
    TRAINING_LAYERS,
    Case,
    Sequences,
    Suite,
    System,
    by_group,
)
from bicompile.bench.limits import least_seconds
from bicompile.bench.processes import Racer, Worker, WorkerFailed, ask_all, running
from bicompile.bench.results import Row


@dataclass(frozen=True)
class Race:
    """One part of the bench (`model`, `ops`, `sequences`, `training`) in one dtype."""

    part: str
    dtype: str
    device: str
    suite: Suite
    rounds: int = 7
    threads: int = 1
    model: str | None = None
    """Instead of the small real one."""
    debug: bool = False

    @property
    def systems(self) -> tuple[System, ...]:
        """Who races."""
        return SYSTEMS[self.device, self.part]

    @property
    def at_once(self) -> bool:
        """Whether systems compile at the same time; where few cores are, they would only wait."""
        return self.device == "cuda"

    def settings(self, system: System) -> dict[str, Any]:
        """What the worker of a system needs to know."""
        shapes = asdict(self.suite.shapes) if self.suite.shapes else None
        sequences = asdict(self.suite.sequences) if self.suite.sequences else None
        if self.part == "sequences" and shapes and sequences:
            shapes["layers"] = sequences["layers"]
        if self.part == "training" and shapes:
            shapes["layers"] = min(shapes["layers"], TRAINING_LAYERS)
        return {
            "part": self.part,
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "model": self.model,
            "debug": self.debug,
            "system": asdict(system),
            "shapes": shapes,
            "sequences": sequences,
            "rows": {g: max(c.batch for c in cs) for g, cs in by_group(self.suite.ops)},
        }

    @contextmanager
    def workers(self, caches: Mapping[str, str]) -> Iterator[dict[str, Worker]]:
        """A process for each system, ended afterwards."""
        workers = {s.name: Worker(self.settings(s), caches[s.name]) for s in self.systems}
        with running(workers):
            yield workers

    @contextmanager
    def caches(self) -> Iterator[dict[str, str]]:
        """An empty folder of compiled code for each system."""
        with ExitStack() as stack:
            folders = {
                s.name: stack.enter_context(tempfile.TemporaryDirectory()) for s in self.systems
            }
            yield folders


def measure_limits(race: Race) -> dict[str, float]:
    """What the machine reads and multiplies; see `bicompile.bench.limits`."""
    copied, size = race.suite.limits
    settings = race.settings(System("limits", "eager")) | {"part": "limits"}
    with tempfile.TemporaryDirectory() as cache:
        worker = Worker(settings, cache)
        with running({"limits": worker}):
            rates: dict[str, float] = worker.ask("measure", copied=copied, size=size)
            return rates


# ---- Models, their training, ops -----------------------------------------------------------------


def models(race: Race, rates: Mapping[str, float] | None, console: Console) -> Iterator[Row]:
    """Rows of the model: compilation, the same in a second process, which goes on to each case."""
    first = race.suite.first
    with race.caches() as caches:
        with console.status(f"{race.dtype} model: the first answer"), race.workers(caches) as begun:
            seconds, failures = first_answer(begun, first)
        yield Row("compile, first answer", "s", seconds, missing=failures)
        with race.workers(caches) as workers:
            with console.status(f"{race.dtype} model: second process"):
                seconds, failures = first_answer(workers, first)
                memory, _ = ask_all(workers, "memory", at_once=False)
            yield Row("second process, first answer", "s", seconds, missing=failures)
            yield Row("second process, peak memory", "MB", memory)
            for row in groups(race, race.suite.models, workers, console):
                yield row.beside(_limit(race, row, rates))
            memory, _ = ask_all(workers, "memory", at_once=False)
        yield Row("peak memory, all cases", "MB", memory)


def first_answer(
    workers: Mapping[str, Racer], cases: Sequence[Case]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds to the first answer of each system, one after the other, and who has none."""
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for case in cases:
        answers, failed = ask_all(workers, "first", case, at_once=False)
        failures |= failed
        seconds = {s: seconds.get(s, 0.0) + v for s, v in answers.items() if s not in failures}
    return seconds, failures


def ops(race: Race, console: Console) -> Iterator[Row]:
    """Rows of the ops."""
    with race.caches() as caches, race.workers(caches) as workers:
        yield from groups(race, race.suite.ops, workers, console)


def training(race: Race, console: Console) -> Iterator[Row]:
    """Rows of training: compilation, each case, and the memory of processes that only train."""
    timed = [case for case in race.suite.training if case.timed]
    with race.caches() as caches:
        with race.workers(caches) as workers:
            with console.status(f"{race.dtype} training: the first step"):
                seconds, failures = first_answer(workers, timed[:1])
            yield Row("compile, first step", "s", seconds, missing=failures)
            yield from groups(race, race.suite.training, workers, console)
        with console.status(f"{race.dtype} training: memory"), race.workers(caches) as again:
            seconds, failures = first_answer(again, timed[:1])
            for case in timed[1:]:
                ask_all(again, "forget", at_once=False)
                failures |= ask_all(again, "first", case, at_once=False)[1]
            memory, _ = ask_all(again, "memory", at_once=False)
        yield Row("second process, first step", "s", seconds, missing=failures)
        yield Row("second process, peak memory", "MB", memory)


def groups(
    race: Race, cases: Sequence[Case], workers: Mapping[str, Racer], console: Console
) -> Iterator[Row]:
    """All cases, group by group: compile, check the bits, time."""
    names = {s.name: s.ops for s in race.systems}
    for group, members in by_group(cases):
        kind = members[0].kind
        racers = {n: w for n, w in workers.items() if not names[n] or kind in names[n]}
        with console.status(f"{race.dtype} {race.part}: {group}"):
            yield from one_group(race, members, racers)
            ask_all(racers, "forget", at_once=race.at_once)


def one_group(race: Race, cases: Sequence[Case], workers: Mapping[str, Racer]) -> Iterator[Row]:
    """The rows of one group; no system gets a time before the group's bits are known to hold."""
    ours = workers[OURS]
    bits: dict[int, list[str]] = {}
    wrong = ""
    for case in (c for c in cases if not c.timed):
        try:
            bits[case.batch] = ours.ask("digests", case)
            # The others do not run this one, so it must not count as memory of ours.
            ours.ask("forget", counts=False)
        except WorkerFailed as error:
            wrong = str(error)
    missing: dict[Case, dict[str, str]] = {}
    for case in (c for c in cases if c.timed):
        _, missing[case] = ask_all(workers, "first", case, at_once=race.at_once)
        if OURS not in missing[case]:
            try:
                bits[case.batch] = ours.ask("digests", case)
            except WorkerFailed as error:
                wrong = str(error)
    wrong = wrong or compare_bits(bits)
    for case, why in missing.items():
        yield take_turns(race, case, workers, why, wrong)


def compare_bits(bits: Mapping[int, Sequence[str]]) -> str:
    """Compare the rows that batches share, by their digests; says what is wrong, or nothing."""
    known: Sequence[str] = ()
    for batch, rows in bits.items():
        if any(a != b for a, b in zip(known, rows, strict=False)):
            return f"bits of a row differ at batch {batch}"
        known = max(known, rows, key=len)
    return "" if len(bits) > 1 else "only one batch size ran, so that no bits could be compared"


def take_turns(
    race: Race,
    case: Case,
    workers: Mapping[str, Racer],
    missing: Mapping[str, str],
    wrong: str,
) -> Row:
    """Time the systems in turn, round after round, and keep each one's fastest.

    A system that is missing, and ours if its bits are wrong, gets no time.
    """
    key = "op" if race.part == "ops" else case.kind
    calls = race.suite.calls[key]
    lost = ({OURS: wrong} if wrong else {}) | dict(missing)
    best: dict[str, float] = {}
    for _ in range(race.rounds):
        for system, worker in workers.items():
            if system not in lost:
                try:
                    seconds = worker.ask("sample", case, calls=calls)
                except WorkerFailed as error:
                    lost[system] = str(error)
                    best.pop(system, None)
                else:
                    best[system] = min(best.get(system, seconds), seconds)
    return Row(case.name, "ms", {s: v * 1e3 for s, v in best.items()}, missing=lost)


def _limit(race: Race, row: Row, rates: Mapping[str, float] | None) -> dict[str, float]:
    """The physical limit of the case of a row, in ms, where shapes and rates are known."""
    case = next((c for c in race.suite.models if c.name == row.what), None)
    if case is None or rates is None or race.suite.shapes is None:
        return {}
    size = 4 if race.dtype == "float32" else 2
    return {"limit": least_seconds(case, race.suite.shapes, size, rates) * 1e3}


# ---- Sequences -----------------------------------------------------------------------------------


def sequences(race: Race, console: Console) -> Iterator[Row]:
    """Rows of the requests: compilation, then the seconds in which each system serves them all."""
    asked = race.suite.sequences
    assert asked is not None
    with race.caches() as caches, race.workers(caches) as workers:
        with console.status(f"{race.dtype} sequences: compiling"):
            seconds, failures = ask_all(workers, "prepare", at_once=race.at_once)
        yield Row("compile, two tokens", "s", seconds, missing=failures)
        with console.status(f"{race.dtype} sequences: bits"):
            wrong = failures.get(OURS) or check_company(workers[OURS], asked)
        lost = failures | ({OURS: wrong} if wrong else {})
        with console.status(f"{race.dtype} sequences: {asked.count} requests"):
            yield serve_all({s: w for s, w in workers.items() if s not in lost}, asked, lost)


def check_company(worker: Racer, asked: Sequences) -> str:
    """Compare what a few requests get in a full batch and among themselves; says what is wrong."""
    few, many = list(range(asked.alone)), list(range(min(asked.slots, asked.count)))
    try:
        crowd = worker.ask("answers", numbers=many, slots=asked.slots)
        alone = worker.ask("answers", numbers=few, slots=asked.alone)
    except WorkerFailed as error:
        return str(error)
    differ = sum(a != b for a, b in zip(alone, crowd, strict=False))
    return f"{differ} of {len(few)} requests get other bits in other company" if differ else ""


def serve_all(workers: dict[str, Racer], asked: Sequences, lost: Mapping[str, str]) -> Row:
    """All requests, batch by batch; at each batch the systems take turns."""
    took = dict.fromkeys(workers, 0.0)
    lost, tokens = dict(lost), 0
    for begin in range(0, asked.count, asked.slots):
        end = min(begin + asked.slots, asked.count)
        still = {s: workers[s] for s in took}
        served, failures = ask_all(still, "serve", at_once=False, begin=begin, end=end)
        lost |= failures
        took = {s: took[s] + served[s]["seconds"] for s in served}
        tokens += max((answer["tokens"] for answer in served.values()), default=0)
    return Row(f"{asked.count} sequences, {tokens} tokens", "s", took, missing=lost)
