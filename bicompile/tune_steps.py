"""Time schedules of products in decoding steps, for the choice in `kernels/matmul/table.py`.

    python -m bicompile.tune_steps --json kernels/matmul/steps-sm9.0.json

`bicompile.tune` times products alone. In a step a kernel starts while the one before it ends, in
the shared memory that is left, so the fastest alone is not always the fastest there. This records
steps of models in CUDA graphs, with each schedule of one product of a layer in turn, beside steps
as they are, and keeps what makes them faster for products of these very sizes. Schedules with
other bits are left out and named. What is kept is used as far as a certificate lists it: run
`bicompile verify --family matmul --new` after it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bicompile.bench import timing
from bicompile.bench.cases import OURS, Case, Shapes, System
from bicompile.bench.random_model import RandomModel, set_length
from bicompile.kernels.common.launch import capability
from bicompile.kernels.common.room import TILES, empty_with_room, rows_with_room
from bicompile.kernels.matmul import gpu, table
from bicompile.kernels.matmul.candidates import candidates_in_steps, factors_of
from bicompile.kernels.matmul.schedules import Schedule
from bicompile.kernels.matmul.table import Size, counted, schedules
from bicompile.machine import check_device, machine, title
from bicompile.testing import bits
from bicompile.tune import compiling

LAYERS = 4
MODELS = {
    "Qwen3 8B": Shapes(LAYERS),
    "Llama 3.1 8B": Shapes(LAYERS, intermediate=14336, vocabulary=128256),
    "Qwen2.5 14B": Shapes(LAYERS, hidden=5120, intermediate=13824, heads=40),
    "Llama 3.1 70B": Shapes(LAYERS, 8192, 28672, heads=64, vocabulary=128256),
}
CONTEXT = 1024  # tokens in the cache
CALLS = 4  # steps of a graph
ROUNDS = 3  # turns of two graphs
FEW, MORE = 6, 12  # of the fastest of them, so many turns
GAIN = 0.003  # what a schedule has to save of a step

Chosen = Mapping[Size, Schedule]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune the steps of models; the exit status is 1 if a schedule had other bits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=MODELS, nargs="+", default=list(MODELS), help="all, if not given")
    add("--batch", type=int, nargs="+", default=[1], metavar="B", help=f"1 to {TILES[-1]}")
    add("--json", type=Path, metavar="FILE", required=True, help="add the schedules to this file")
    args = parser.parse_args(arguments)
    if not all(1 <= batch <= TILES[-1] for batch in args.batch):
        parser.error(f"--batch: 1 to {TILES[-1]}, as many rows as a whole tile may have")
    check_device("cuda")
    console = Console()
    here = machine("cuda")
    console.print(title(here))
    found: dict[Size, Schedule] = {}
    timed, other = [], []
    for batch in args.batch:
        for name in args.model:
            steps = Steps(MODELS[name], batch)
            before = dict(found)
            found |= tuned(steps, found)
            timed.append({"model": name, "batch": batch} | steps.race(found))
            other += steps.other
            console.print(json.dumps(timed[-1]), soft_wrap=True)
            for size in found.keys() - before.keys():
                console.print(f"  {size}: {found[size]}", soft_wrap=True)
            del steps
            torch.compiler.reset()
    write(args.json, here, found, timed)
    for text in other:
        console.print(f"other bits: {text}", soft_wrap=True)
    return int(bool(other))


def write(
    file: Path, here: Mapping[str, Any], found: Chosen, timed: Sequence[Mapping[str, Any]]
) -> None:
    """Write schedules as the table reads them; what the file has for other sizes stays."""
    before = json.loads(file.read_text()) if file.exists() else {"sizes": [], "steps": []}
    sizes = [t for t in before["sizes"] if _size(t) not in found]
    for (kind, rows, columns, terms), schedule in found.items():
        size = {"kind": kind, "rows": rows, "columns": columns, "terms": terms}
        sizes.append(size | {"schedule": astuple(schedule)})
    again = {(t["model"], t["batch"]) for t in timed}
    steps = [t for t in before["steps"] if (t["model"], t["batch"]) not in again]
    lines = {
        "sizes": [json.dumps(t) for t in sorted(sizes, key=_size)],
        "steps": [json.dumps(t) for t in [*steps, *timed]],
    }
    parts = [f' "machine": {json.dumps(here)}']
    parts += [f' "{name}": [\n  ' + ",\n  ".join(some) + "\n ]" for name, some in lines.items()]
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _size(timed: Mapping[str, Any]) -> Size:
    return timed["kind"], timed["rows"], timed["columns"], timed["terms"]


# ------------------------------------------------------------------------------------------ search


def tuned(steps: Steps, found: Chosen) -> dict[Size, Schedule]:
    """What makes the steps of a model faster, beside what was found before."""
    sizes = [size for size in steps.sizes if size not in found]
    tries = {size: steps.tries(size) for size in sizes}
    build(tries, steps)
    return better(tries, functools.partial(steps.ratio, found))


def better(
    tries: Mapping[Size, Sequence[Schedule]],
    ratio: Callable[[Chosen, Size, Schedule, int], float],
) -> dict[Size, Schedule]:
    """Schedules that make a step faster, one size after the other.

    Twice, as each of them changes what the others meet: the second time the fastest of the first.

    Args:
        tries: of each size, what may serve.
        ratio: the time of a step with what was chosen so far and this schedule for a size, divided
            by that without it, in so many rounds; infinite if the schedule cannot be used.
    """
    chosen: dict[Size, Schedule] = {}
    fastest = dict(tries)
    for _ in range(2):
        for size, some in fastest.items():
            times = {s: ratio(chosen, size, s, ROUNDS) for s in some}
            possible = [s for s in some if times[s] < math.inf]
            fastest[size] = sorted(possible, key=times.__getitem__)[:FEW]
            times = {s: ratio(chosen, size, s, MORE) for s in fastest[size]}
            best = min(times, key=times.__getitem__, default=None)
            if best is not None and times[best] < 1 - GAIN:
                chosen[size] = best
    return chosen


class Steps:
    """Decoding steps of a model after CONTEXT tokens, recorded with any schedules.

    `sizes`: those of the products of its layers, the largest first. `other`: schedules that had
    other bits.
    """

    def __init__(self, shapes: Shapes, batch: int) -> None:
        system = System(OURS, "bicompile", dynamic=False)
        self.batch = batch
        self.model = RandomModel(system, shapes, "cuda", "bfloat16")
        case = Case(f"decode {CONTEXT}", batch)
        self.model.first(case)
        self.cache, self.length, (self.inputs, *_) = self.model.hold(case)
        self.other: list[str] = []
        self.least: dict[Size, int] = {}
        seen: Counter[Size] = Counter()
        self.expected = self.logits({}, seen)
        of_layers = (size for size, times in seen.items() if times >= shapes.layers)
        self.sizes = sorted(of_layers, key=_bytes, reverse=True)
        self.recorded: tuple[Chosen, timing.Graph] = {}, self.record({})

    def tries(self, size: Size) -> list[Schedule]:
        """What may serve a size: tiles that are whole where rows have room behind them."""
        kind, tile = size[0], rows_with_room(self.batch)
        known = schedules(kind, capability(torch.device("cuda")))
        in_use = (s for s in known if s.bm <= tile and not s.persistent)
        found = dict.fromkeys((*candidates_in_steps(kind, tile), *in_use))
        return [s for s in found if not self.least[size] or s.serves_several(self.least[size])]

    def ratio(
        self, fixed: Chosen, chosen: Chosen, size: Size, schedule: Schedule, rounds: int
    ) -> float:
        """See `better`; `fixed` serves the sizes that are not looked at."""
        now = {**fixed, **chosen}
        if self.recorded[0] != now:
            self.recorded = now, self.record(now)
        then = now | {size: schedule}
        try:
            if not torch.equal(self.logits(then), self.expected):
                self.other.append(f"{size} {schedule}")
                return math.inf
        except Exception as error:  # too much shared memory, or too many registers
            print(f"{size} {schedule}: {error}", file=sys.stderr)
            return math.inf
        with_it, without = self.record(then), self.recorded[1]
        return statistics.median(
            self.seconds(with_it) / self.seconds(without) for _ in range(rounds)
        )

    def race(self, chosen: Chosen) -> dict[str, float]:
        """Milliseconds of a step before and with what was chosen, in turns."""
        graphs = {"before": self.record({}), "after": self.record(chosen)}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(2 * MORE):
            for name, graph in graphs.items():
                times[name].append(self.seconds(graph) * 1e3)
        return {name: round(statistics.median(some), 4) for name, some in times.items()}

    def logits(self, chosen: Chosen, seen: Counter[Size] | None = None) -> torch.Tensor:
        """The bits of what a step returns."""
        set_length(self.cache, self.length)
        with self.using(chosen, seen), torch.no_grad():
            return bits(self.model.forward(**self.inputs).logits).clone()

    def record(self, chosen: Chosen) -> timing.Graph:
        """A CUDA graph of CALLS steps."""
        set_length(self.cache, self.length)
        with self.using(chosen), torch.no_grad():
            return timing.Graph([lambda: self.model.forward(**self.inputs)] * CALLS)

    def seconds(self, graph: timing.Graph) -> float:
        """Seconds of a step in the fastest of a few replays."""
        set_length(self.cache, self.length)
        return graph.seconds()

    @contextmanager
    def using(self, chosen: Chosen, seen: Counter[Size] | None = None) -> Iterator[None]:
        """Let launches take what was chosen; counts the sizes that are `seen`."""
        in_use: Callable[..., Schedule] = table.schedule

        def schedule(
            kind: str, device: str, processors: int, m: int, n: int, k: int, blocks: bool,
            room: int = 0, least: int = 0,
        ) -> Schedule:  # fmt: skip
            size = kind, counted(m), n, k
            if seen is not None:
                seen[size] += 1
                self.least[size] = least
            if size in chosen and blocks:
                return chosen[size]
            return in_use(kind, device, processors, m, n, k, blocks, room, least)

        with mock.patch.object(gpu, "schedule", schedule):
            yield


def _bytes(size: Size) -> int:
    kind, _, columns, terms = size
    return factors_of(kind) * columns * terms


def build(tries: Mapping[Size, Sequence[Schedule]], steps: Steps) -> None:
    """Compile what will be tried, as layers of Qwen and Llama launch it."""
    launch: Any = gpu
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    with compiling():
        for size, some in tries.items():
            kind, _, n, k = size
            x, added = (empty_with_room(steps.batch, columns, **like) for columns in (k, n))
            least = steps.least[size]
            for s in some:
                if least:
                    columns = n - 2 * least, least, least
                    weights = (torch.empty(c, k, **like).t() for c in columns)
                    launch.qkv_proj(x, *weights, None, None, None, False, chosen=s)
                elif factors_of(kind) == 2:
                    gate, up = (torch.empty(n, k, **like).t() for _ in range(2))
                    launch.swiglu(x, gate, up, False, chosen=s)
                else:
                    launch.mm_add(x, torch.empty(n, k, **like).t(), added, False, chosen=s)


if __name__ == "__main__":
    raise SystemExit(main())
