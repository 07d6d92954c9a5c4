"""Time the schedules of the GPU matmul, for the choice in `kernels/matmul/table.py`.

    python -m bicompile.tune --times kernels/matmul/times-sm9.0.json --json FILE

times each schedule with few and many tiles for each multiprocessor, in a CUDA graph, behind a norm
and with weights that are not in the L2 cache, and keeps as few as leave no size more than TOLERANCE
slower. Then it races them on layers of models: what the launch would take against the fastest of
its entries, and against what PyTorch calls. Schedules with other bits than the single one are left
out and named. What is kept is used as far as a certificate lists it (`bicompile verify`);
`--certified` times those alone that one lists, so nothing needs to be verified after it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bicompile.kernels.matmul.candidates import candidates, factors_of
from bicompile.kernels.matmul.schedules import SINGLE, Schedule
from bicompile.kernels.matmul.table import TERMS, Entry, by_time, table
from bicompile.machine import check_device, machine, title
from bicompile.testing import bits

#: (columns, terms) of layers of Qwen3-8B, Llama 3.1 8B and 70B, Qwen2.5-14B; of a pair: of each.
LAYERS = {
    "half": (
        (4096, 4096), (6144, 4096), (12288, 4096), (24576, 4096), (4096, 12288), (151936, 4096),
        (28672, 4096), (4096, 14336), (8192, 8192), (10240, 8192), (5120, 5120), (2048, 2048),
    ),
    "half pair": ((12288, 4096), (14336, 4096), (13824, 5120), (28672, 8192)),
}  # fmt: skip
#: Bounds of the entries -> rows for which they are timed.
ROWS = {
    1: 1, 16: 8, 31: 24, 32: 32, 63: 48, 64: 64, 127: 100, 128: 128, 256: 256, 1024: 512,
    1 << 62: 4096,
}  # fmt: skip
RACED = (1, 8, 20, 32, 50, 64, 100, 128, 200, 256, 384, 512, 1000, 2048, 4096)
QUARTERS = 12  # of as many tiles as there are multiprocessors
TOLERANCE = 0.05
FEW = 16  # rows of small batches, which are decoded most: a third of the TOLERANCE
CACHE = 128 << 20  # bytes of weights after which the L2 cache holds none of the first
LAUNCHES = 12


@dataclass(frozen=True)
class Raced:
    """Microseconds of one size: of what the table would take, and of what PyTorch calls."""

    kind: str
    rows: int
    columns: int
    terms: int
    chosen: str
    table: float
    fastest: str
    best: float
    library: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all candidates; the exit status is 1 if a schedule had other bits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--kind", choices=LAYERS, nargs="+", default=list(LAYERS), help="others keep their entries")
    bounds: list[int] = list(ROWS)
    add("--rows", type=int, choices=bounds, nargs="+", default=bounds, help="likewise")
    add("--certified", action="store_true", help="what is in use, timed anew")
    add("--refine", action="store_true", help="of these times and those in use, take the less")
    add("--times", type=Path, metavar="FILE", help="write the entries")
    add("--json", type=Path, metavar="FILE", help="write the races")
    args = parser.parse_args(arguments)
    check_device("cuda")
    console = Console()
    here = machine("cuda")
    console.print(title(here))
    entries = {kind: table(kind, here["capability"]) for kind in LAYERS}
    raced: list[Raced] = []
    other: list[str] = []
    for kind in args.kind:
        weights = Weights(kind)
        tried = {rows: [*candidates(kind, rows, args.certified)] for rows in sorted(args.rows)}
        if not any(tried.values()):
            parser.error(f"no schedule of {kind} is certified: run `bicompile verify` before")
        build(tried, weights)
        timed = [e for rows in tried for e in time_waves(rows, tried[rows], weights, other)]
        tolerance = 0.0 if args.certified else TOLERANCE
        entries[kind] = joined(timed, entries[kind], args.refine, tolerance, weights.processors)
        for (columns, terms), rows in itertools.product(LAYERS[kind], RACED):
            raced.append(race(kind, entries[kind], rows, columns, terms, weights))
            console.print(line(raced[-1]), soft_wrap=True)
    if args.times:
        write(args.times, here, entries)
    if args.json:
        content = {"machine": here, "raced": [asdict(r) for r in raced]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    for name in other:
        console.print(f"other bits: {name}")
    return int(bool(other))


def write(file: Path, here: Mapping[str, Any], entries: Mapping[str, Sequence[Entry]]) -> None:
    """Write entries as `kernels/matmul/table.py` reads them, each on a line of its own."""
    kinds = []
    for kind, found in entries.items():
        lines = (json.dumps([e.rows, [*asdict(e.schedule).values()], e.waves]) for e in found)
        kinds.append(f'  "{kind}": [\n    ' + ",\n    ".join(lines) + "\n  ]")
    text = f' "machine": {json.dumps(here)},\n "entries": {{\n' + ",\n".join(kinds) + "\n }"
    file.write_text("{\n" + text + "\n}\n")


def line(raced: Raced) -> str:
    """A race in one line."""
    ratios = raced.table / raced.library, raced.table / raced.best
    text = f"{raced.kind} {raced.rows} x {raced.columns} x {raced.terms}: {raced.table:.1f} us, "
    return text + f"{ratios[0]:.2f} of the library, {ratios[1]:.2f} of the best: {raced.chosen}"


class Weights:
    """Weights of any size, and an op on them, out of one buffer that is larger than the cache."""

    def __init__(self, kind: str) -> None:
        from bicompile.kernels.matmul import gpu

        self.processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        self.kind = kind
        self.factors = factors_of(kind)
        self.launch: Callable[..., Any] = gpu.swiglu if self.factors == 2 else gpu.mm
        generator = torch.Generator("cuda").manual_seed(0)
        like: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.buffer = torch.empty(3 << 29, **like).normal_(0, 0.1, generator=generator)
        self.left = torch.empty(4096 * 16384, **like).normal_(0, 0.1, generator=generator)

    def operands(self, rows: int, columns: int, terms: int) -> list[tuple[torch.Tensor, ...]]:
        """Calls' operands, as many as the cache does not hold."""
        x = self.left[: rows * terms].view(rows, terms).clone()  # without room behind it
        size = columns * terms
        made: list[tuple[torch.Tensor, ...]] = []
        while not made or len(made) * size * 2 * self.factors < CACHE:
            at = [(len(made) * self.factors + i) * size for i in range(self.factors)]
            weights = (self.buffer[i : i + size].view(columns, terms).t() for i in at)
            made.append((x, *weights))
        return made

    def run(self, schedule: Schedule, x: torch.Tensor, *weights: torch.Tensor) -> None:
        """What a schedule is mostly used for: without descriptors, q, k and v in one kernel."""
        from bicompile.kernels.matmul import gpu

        columns = weights[0].shape[1]
        few = columns // schedule.bn // 6 * schedule.bn
        if self.factors == 2 or schedule.tma or not few or len(x) > gpu.QKV_ROWS:
            self.launch(x, *weights, False, chosen=schedule)
        else:
            qkv_proj: Callable[..., Any] = gpu.qkv_proj
            q, k, v = weights[0].split((columns - 2 * few, few, few), 1)
            qkv_proj(x, q, k, v, None, None, None, False, chosen=schedule)

    def library(self, x: torch.Tensor, *weights: torch.Tensor) -> None:
        """The products as PyTorch runs them."""
        for w in weights:
            torch.mm(x, w)


@contextmanager
def compiling() -> Iterator[None]:
    """Let launches with meta tensors compile kernels in parallel; on leaving they are ready."""
    from triton import AsyncCompileMode

    from bicompile.kernels.common.launch import building_for

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        building_for(torch.device("cuda", torch.cuda.current_device())),
    ):
        yield


def build(tried: Mapping[int, Sequence[Schedule]], weights: Weights) -> None:
    """Compile all kernels."""
    with compiling():
        for rows in tried:
            meta = [x.to("meta") for x in weights.operands(ROWS[rows], 4096, 4096)[0]]
            for s in tried[rows]:
                weights.launch(*meta, False, chosen=s)
                weights.run(s, *meta)


def time_waves(
    rows: int, tried: Sequence[Schedule], weights: Weights, other: list[str]
) -> Iterator[Entry]:
    """The times of schedules for a number of rows; names those of other bits."""
    m, kind = ROWS[rows], weights.kind
    console = Console(file=sys.stderr)
    sample = weights.operands(m, 768, TERMS)[0]
    expected = bits(weights.launch(*sample, False, chosen=SINGLE[kind]))
    for s in track(tried, f"{kind} {rows}", console=console, transient=True):
        try:
            same = torch.equal(bits(weights.launch(*sample, False, chosen=s)), expected)
        except Exception as error:  # too much shared memory, or too many registers
            print(f"{s}: {error}", file=sys.stderr)
            continue
        if not same:
            other.append(f"{kind} {s}")
            continue
        times = []
        for quarters in range(1, QUARTERS + 1):
            tiles = max(1, weights.processors * quarters // 4 // -(-m // s.bm))
            operands = weights.operands(m, s.bn * tiles, TERMS)
            seconds = _time(functools.partial(weights.run, s), operands)
            times.append(round(seconds * 1e6, 1))
        yield Entry(rows, s, tuple(times))


def joined(
    timed: Sequence[Entry], before: Sequence[Entry], refine: bool, tolerance: float, processors: int
) -> tuple[Entry, ...]:
    """Of rows that were timed what is needed, of others the entries before, by rising rows."""
    rows = {e.rows for e in timed}
    if refine:
        timed = refined(timed, [e for e in before if e.rows in rows])
    others = [e for e in before if e.rows not in rows]
    found = [*needed(timed, tolerance, processors), *others]
    return tuple(sorted(found, key=lambda e: e.rows))


def refined(entries: Sequence[Entry], before: Sequence[Entry]) -> list[Entry]:
    """Of two measurements of a schedule the lesser times: what else happens only adds to them."""
    found = {(e.rows, e.schedule): e for e in before if len(e.waves) == QUARTERS}
    for e in entries:
        other = found.get((e.rows, e.schedule), e)
        waves = tuple(map(min, e.waves, other.waves))
        found[e.rows, e.schedule] = replace(e, waves=waves)
    return sorted(found.values(), key=lambda e: e.rows)


def needed(entries: Sequence[Entry], tolerance: float, processors: int) -> list[Entry]:
    """Entries of as few schedules as keep the best time of each size within a tolerance.

    Operands that no descriptor can stand for, and q, k and v in one kernel, have their own entries.
    """
    pointers = [e for e in entries if not e.schedule.tma]
    some = _cover(entries, tolerance, processors, set())
    some |= _cover(pointers, 2 * tolerance, processors, some)
    kept = {e for found in (entries, pointers) for e in _fastest(found, some, processors)}
    return [e for e in entries if e in kept]


#: Numbers of columns for which entries are chosen.
COLUMNS = (
    1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384,
    18432, 24576, 28672, 36864, 57344, 65536, 128256, 151936,
)  # fmt: skip


def _cover(
    entries: Sequence[Entry], tolerance: float, processors: int, first: set[Schedule]
) -> set[Schedule]:
    """As few schedules as are near enough to the fastest for all sizes, with those of `first`."""
    within: dict[Schedule, set[tuple[int, int]]] = {e.schedule: set() for e in entries}
    sizes = set(itertools.product({e.rows for e in entries}, COLUMNS))
    for rows, n in sizes:
        times = {e.schedule: _modelled(e, n, processors) for e in entries if e.rows == rows}
        limit = min(times.values()) * (1 + tolerance / (3 if rows <= FEW else 1))
        for s, time in times.items():
            if time <= limit:
                within[s].add((rows, n))
    kept = {s for s in first if s in within}
    left = sizes.difference(*(within[s] for s in kept))
    while left:
        kept.add(max(within, key=lambda s: len(within[s] & left)))
        left.difference_update(*(within[s] for s in kept))
    return kept


def _fastest(entries: Sequence[Entry], among: set[Schedule], processors: int) -> set[Entry]:
    """The entry of each size that has the least time."""
    found = [e for e in entries if e.schedule in among]
    return {
        min((e for e in found if e.rows == rows), key=lambda e: _modelled(e, n, processors))
        for rows, n in itertools.product({e.rows for e in found}, COLUMNS)
    }


def _modelled(e: Entry, columns: int, processors: int) -> float:
    return e.time(processors, ROWS[e.rows], columns, TERMS)


def race(
    kind: str, entries: Sequence[Entry], m: int, columns: int, terms: int, weights: Weights
) -> Raced:
    """Time what the entries would choose for a size, all others, and the library."""
    operands = weights.operands(m, columns, terms)
    tried = [e.schedule for e in by_time(entries, weights.processors, m, columns, terms)]
    times = {s: _time(lambda *x, s=s: weights.launch(*x, False, chosen=s), operands) for s in tried}
    best = min(times, key=times.__getitem__)
    library = _time(weights.library, operands)
    table, fastest, library = (x * 1e6 for x in (times[tried[-1]], times[best], library))
    return Raced(kind, m, columns, terms, str(tried[-1]), table, str(best), fastest, library)


def _time(call: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Seconds of one call behind a norm of its rows, as in a model, without those of the norm.

    Products that follow each other alone overlap: tiles of the next fill what a last wave leaves.
    """
    x = operands[0][0]

    def behind_norm(*given: Any) -> None:
        _norm(x)
        call(*given)

    return _replayed(behind_norm, operands) - _seconds_of_norm(x.shape)


@functools.cache
def _seconds_of_norm(shape: torch.Size) -> float:
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    return _replayed(_norm, [(x,)])


def _norm(x: torch.Tensor) -> None:
    from bicompile.kernels.norm import gpu

    rms_norm: Callable[..., Any] = gpu.rms_norm
    rms_norm(x, 1, None, 1e-6, 0.0, True)


def _replayed(call: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Seconds of one call: the least of several replays of a CUDA graph of LAUNCHES calls."""
    call(*operands[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            call(*operands[i % len(operands)])
    best = float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / LAUNCHES)
    return best


if __name__ == "__main__":
    raise SystemExit(main())
