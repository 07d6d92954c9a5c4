"""What `bicompile verify` tries on the row kernels; softmax and norm declare theirs by it too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bicompile.kernels.common.trees import BLOCK
from bicompile.kernels.reduce import gpu
from bicompile.kernels.reduce.parts import CHAIN
from bicompile.kernels.reduce.table import LONG, TABLE, Entry
from bicompile.sweep import VALUES, BitClass, Depth, Problem

#: Terms of a row by bit class: with the quick ones first.
TERMS = {
    "block 16": (3, 16, 1, 2, 5),
    "block 64": (64, 33),
    "block 256": (200, 256),
    "block 1024": (576, 1000),
    "block 2048": (2048, 1025),
    "block 4096": (4096, 2049),
    "blocks": (5000, 12288, 4097),
}
ROWS = ((0, 1), (3, 4), (1, 130), (17, 50))
FULL = torch.float32


@dataclass(frozen=True)
class Op:
    """An op on the rows of x [M, K].

    Args:
        run: called with x, the weights and a schedule.
        weights: how many vectors of K elements it takes.
        quick: whether it stands for the others where little is tried.
    """

    run: Callable[..., Any]
    weights: int = 0
    quick: bool = False


def _norm(p: float) -> Op:
    return Op(lambda x, s: gpu.norm(x, p, [1], False, FULL, chosen=s))


OPS = {
    "sum": Op(lambda x, s: gpu.sum(x, [1], False, FULL, chosen=s), quick=True),
    "mean": Op(lambda x, s: gpu.mean(x, [1], False, x.dtype, chosen=s)),
    "prod": Op(lambda x, s: gpu.prod(x, [1], False, FULL, chosen=s)),
    "var": Op(lambda x, s: gpu.var(x, [1], 1.0, False, chosen=s)),
    "std": Op(lambda x, s: gpu.std(x, [1], 0.0, False, chosen=s)),
    "var_mean": Op(lambda x, s: gpu.var_mean(x, [1], 1.0, False, chosen=s)),
    "logsumexp": Op(lambda x, s: gpu.logsumexp(x, [1], False, chosen=s), quick=True),
    **{f"norm {p}": _norm(p) for p in (0.0, 1.0, 2.0, 3.5, math.inf, -math.inf)},
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table."""
    return row_classes("reduce", OPS, depth)


def row_classes(
    family: str, ops: Mapping[str, Op], depth: Depth, cut: bool = True
) -> Iterator[BitClass]:
    """The bit classes of a family of row kernels; cut: they can have rows in parts."""
    for entry in (*TABLE, LONG):
        problems = list(_problems(ops, entry, depth))
        if cut and entry is LONG and depth is Depth.FULL:
            problems += _very_long(ops)
        yield BitClass(family, entry.name, entry.single, entry.schedules(cut), tuple(problems))


def _very_long(ops: Mapping[str, Op]) -> Iterator[Problem]:
    """A vocabulary, and more blocks than are joined in one stage."""
    for k in (151936, (CHAIN + 1) * BLOCK + 1):
        for name, op in ops.items():
            if op.quick:
                yield Problem(
                    f"{name} bfloat16 5x{k}", torch.bfloat16, ((5, k),),
                    lambda x, s, op=op: op.run(*x, s), ((1, 2),), values=("random", "cancelling"),
                )  # fmt: skip


def _problems(ops: Mapping[str, Op], entry: Entry, depth: Depth) -> Iterator[Problem]:
    """Full: all sizes and layouts for the ops that stand for the others; two sizes for the rest."""
    rows = depth.pick(5, 300, 300)
    for number, k in enumerate(TERMS[entry.name][: depth.pick(1, 1, None)]):
        for name, op in ops.items():
            if not op.quick and (depth is not Depth.FULL or number > 1):
                continue
            halves = (torch.bfloat16, torch.float16)[: 2 if number < 2 else 1]
            for dtype in (FULL, *(halves if op.quick and depth is Depth.FULL else ())):
                yield Problem(
                    f"{name} {str(dtype).removeprefix('torch.')} {rows}x{k}",
                    dtype,
                    ((rows, k), *((k,),) * op.weights),
                    lambda x, s, op=op: op.run(*x, s),
                    ROWS[1:2] if depth is Depth.SMALL else ROWS,
                    layouts=_layouts(op, dtype, depth),
                    values=depth.pick(("random",), ("random", "cancelling"), tuple(VALUES)),
                )
        if depth is Depth.FULL and k <= 1000:
            name, op = next((n, o) for n, o in ops.items() if o.quick)
            yield Problem(
                f"{name} float32 5000x{k}", FULL, ((5000, k), *((k,),) * op.weights),
                lambda x, s, op=op: op.run(*x, s), ((4990, 5000),),
            )  # fmt: skip


def _layouts(op: Op, dtype: torch.dtype, depth: Depth) -> tuple[str, ...]:
    """A layout is a kernel of its own to compile, so few of them are tried where time is short."""
    if depth is not Depth.FULL:
        return ("misaligned",)
    if not op.quick or dtype is torch.float16:
        return ("misaligned",)
    return "misaligned", "misaligned rows", "every second element"
