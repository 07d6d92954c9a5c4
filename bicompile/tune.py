"""Find the fastest schedules of the GPU matmul, for the tables in `kernels/matmul/schedules.py`.

    python -m bicompile.tune --json FILE

races many schedules on the sizes of a model's layers. What other bits than the single schedule has
is left out and named; what is raced is a launch inside a CUDA graph, with weights that are not in
the L2 cache. The tables are literals: what it finds is copied by hand, and certified by
`bicompile verify` before it is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bicompile.machine import check_device, machine, title
from bicompile.testing import bits

#: Qwen3-8B: op, columns, terms. "swiglu": columns of each half.
LAYERS = (
    ("qkv_proj", 6144, 4096),
    ("mm_add", 4096, 4096),
    ("swiglu", 12288, 4096),
    ("mm_add", 4096, 12288),
    ("mm", 151936, 4096),
)
ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 8192)
CACHE = 128 << 20  # bytes of weights after which the L2 cache holds none of the first
SHARED = 232448  # bytes of shared memory that a block of sm_90 may have
LAUNCHES = 16


@dataclass(frozen=True)
class Found:
    """One race: the schedules in rising order of their time, and what the libraries take."""

    op: str
    rows: int
    columns: int
    terms: int
    library: float
    table: float
    best: list[tuple[str, float]]
    other_bits: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Race all sizes; the exit status is 1 if a schedule had other bits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--layer", type=int, nargs="+", default=range(len(LAYERS)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    check_device("cuda")
    console = Console()
    here = machine("cuda")
    console.print(title(here))
    found: list[Found] = []
    for layer, rows in itertools.product(args.layer, args.rows):
        found.append(race(*LAYERS[layer], rows))
        console.print(line(found[-1]))
        if args.json:
            results = [asdict(f) for f in found]
            args.json.write_text(json.dumps({"machine": here, "found": results}, indent=1) + "\n")
    return int(any(f.other_bits for f in found))


def line(found: Found) -> str:
    """A race in one line."""
    name, seconds = found.best[0]
    text = f"{found.op} {found.rows} x {found.columns} x {found.terms}: {seconds * 1e6:.1f} us, "
    text += f"table {found.table * 1e6:.1f}, library {found.library * 1e6:.1f}, {name}"
    return text + "".join(f"\n  other bits: {s}" for s in found.other_bits)


def race(op: str, columns: int, terms: int, rows: int) -> Found:
    """Race the schedules for one op and size."""
    from bicompile.kernels.matmul import gpu
    from bicompile.kernels.matmul.schedules import Schedule, wanted

    two = op == "swiglu"
    kind = "half pair" if two else "half"
    entry = wanted(kind, "9.0", rows, columns, terms, op != "qkv_proj")
    tried = list(dict.fromkeys([entry, *candidates(Schedule, rows, two, op == "qkv_proj")]))
    operands = _operands(op, columns, terms, rows)
    launch = getattr(gpu, op)
    _build(launch, operands[0], tried)
    expected = bits(_first(launch(*operands[0], False, chosen=entry)))
    seconds: dict[str, float] = {}
    other: list[str] = []
    for s in track(tried, f"{op} {rows}", console=Console(file=sys.stderr), transient=True):
        try:
            same = torch.equal(bits(_first(launch(*operands[0], False, chosen=s))), expected)
        except Exception as error:  # too much shared memory, or too many registers
            print(f"{s}: {error}", file=sys.stderr)
            continue
        if same:
            seconds[str(s)] = _time(lambda x, s=s: launch(*x, False, chosen=s), operands)
        else:
            other.append(str(s))
    best = sorted(seconds.items(), key=lambda item: item[1])[:5]
    library = _time(_library(op), operands)
    return Found(op, rows, columns, terms, library, seconds[str(entry)], best, other)


def candidates(make: Callable[..., Any], rows: int, two: bool, pointers: bool) -> Iterator[Any]:
    """Schedules whose tiles suit a number of rows and fit the shared memory."""
    for bm, bn, bk in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (64, 128, 256)):
        if not rows / 2 <= bm <= max(2 * rows, 16) and not (rows > 128 and bm >= 64):
            continue
        large = bm * bn * (2 if two else 1)
        if large < 512 or large > 32768 or (large >= 8192 and bk > 128):
            continue
        warps = (8,) if large >= 16384 else (4, 8) if large >= 8192 else (4,)
        stage = (bm + bn * (2 if two else 1)) * bk * 2
        most = min(6, (SHARED - 2048) // stage)
        deep = [n for n in (most - 1, most) if n >= 3 and n * stage >= 49152]
        for w, stages, tma in itertools.product(warps, deep, (False, True)):
            if tma and pointers:
                continue
            yield make(bm, bn, bk, w, stages, tma)
            if tma and large >= 8192:
                yield from (make(bm, bn, bk, w, stages, tma, True, p) for p in (1, 2))


def _operands(op: str, columns: int, terms: int, rows: int) -> list[tuple[Any, ...]]:
    """Enough copies of the weights to fill the cache; the rows are the same."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        like: dict[str, Any] = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        return torch.randn(*shape, **like) * 0.1

    x, added = random(rows, terms), random(rows, columns)
    size = columns * terms * (4 if op == "swiglu" else 2)
    copies: list[tuple[Any, ...]] = []
    for _ in range(max(1, -(-CACHE // size))):
        if op == "swiglu":
            copies.append((x, random(columns, terms).t(), random(columns, terms).t()))
        elif op == "qkv_proj":
            w = random(columns, terms)
            q, k, v = w.split([columns - columns // 3, columns // 6, columns // 6])
            copies.append((x, q.t(), k.t(), v.t(), None, None, None))
        else:
            w = random(columns, terms).t()
            copies.append((x, w, added) if op == "mm_add" else (x, w))
    return copies


def _library(op: str) -> Callable[..., Any]:
    """The product alone as PyTorch runs it; one call for those that lie side by side."""

    def call(x: tuple[Any, ...]) -> Any:
        if op == "swiglu":
            return torch.mm(x[0], x[1]), torch.mm(x[0], x[2])
        if op == "qkv_proj":
            base = x[1].t()
            whole = base.as_strided((base.shape[0] * 3 // 2, base.shape[1]), base.stride())
            return torch.mm(x[0], whole.t())
        return torch.mm(x[0], x[1])

    return call


def _build(launch: Callable[..., Any], operands: tuple[Any, ...], tried: Sequence[Any]) -> None:
    """Compile all kernels in parallel."""
    from triton import AsyncCompileMode

    from bicompile.kernels.common.launch import building_for

    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in operands]
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
        building_for(torch.device("cuda", torch.cuda.current_device())),
    ):
        for s in tried:
            launch(*meta, False, chosen=s)


def _time(call: Callable[..., Any], operands: Sequence[Any]) -> float:
    """Seconds of one call: the least of several replays of a CUDA graph of LAUNCHES calls."""
    call(operands[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            call(operands[i % len(operands)])
    best = float("inf")
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / LAUNCHES)
    return best


def _first(result: Any) -> torch.Tensor:
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found


if __name__ == "__main__":
    raise SystemExit(main())
