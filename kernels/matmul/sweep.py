"""What `bicompile verify` tries on the matmul kernels: every schedule of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.kernels.matmul import gpu
from bicompile.kernels.matmul.schedules import SINGLE, TABLE, schedules
from bicompile.sweep import VALUES, BitClass, Depth, Problem

#: kind -> dtypes, the first where little is tried.
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "ieee": (torch.float32,),
}

#: (M, K, N): sizes below, at and beyond the edges of tiles; K with and without a tail.
SIZES = {
    Depth.SMALL: ((20, 70, 33),),
    Depth.QUICK: ((130, 576, 136), (70, 777, 33)),
    Depth.FULL: (
        (300, 576, 257), (129, 777, 48), (300, 2048, 320), (2500, 1000, 64), (130, 8200, 130),
        (17, 64, 16), (5, 3, 7),
    ),
}  # fmt: skip

#: form -> op, and its beta and alpha.
FORMS = {
    "mm": (gpu.mm, ()),
    "linear": (gpu.addmm, (1.0, 1.0)),
    "addmm": (gpu.addmm, (0.5, -2.0)),
    "bmm": (gpu.bmm, ()),
    "baddbmm": (gpu.baddbmm, (1.0, 0.125)),
}

#: Rows alone: the first, one inside, and counts around the edges of tiles.
ROWS = ((0, 1), (5, 6), (0, 16), (3, 20), (0, 33), (0, 64), (1, 66), (0, 128), (1, 130), (7, 264))
LAYOUTS = ("misaligned", "reversed strides", "misaligned rows", "every second element")


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per kind."""
    for kind in TABLE:
        problems = tuple(_problems(kind, depth))
        yield BitClass("matmul", kind, SINGLE[kind], schedules(kind), problems)


def _problems(kind: str, depth: Depth) -> Iterator[Problem]:
    small, full = depth is Depth.SMALL, depth is Depth.FULL
    tf32 = kind == "tf32"
    for dtype in DTYPES[kind][-1:] if small else DTYPES[kind] if full else DTYPES[kind][:1]:
        for number, (m, k, n) in enumerate(SIZES[depth]):
            rows = tuple(r for r in ROWS if r[1] <= m)
            yield Problem(
                f"mm {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k)), _run("mm", tf32),
                rows[1:3] if small else rows, layouts=LAYOUTS[: depth.pick(1, 2, None)],
                values=_values(depth),
            )  # fmt: skip
            if number < depth.pick(1, 1, 2):
                yield Problem(
                    f"linear {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (n,)),
                    _run("linear", tf32), rows[:2], values=("random", "ties"),
                )  # fmt: skip
            if number < depth.pick(0, 1, 2):
                yield Problem(
                    f"addmm {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (m, n)),
                    _run("addmm", tf32), rows[:2], (0, 2), values=("random", "ties"),
                )  # fmt: skip
        if full:
            b, m, k, n = 3, 40, 200, 72
            shapes = (b, m, k), (b, n, k), (b, m, n)
            for name, count in (("bmm", 2), ("baddbmm", 3)):
                yield Problem(
                    f"{name} {_name(dtype)} {b}x{m}x{k}x{n}", dtype, shapes[:count],
                    _run(name, tf32), ((1, 2),), (0, 1, 2),
                )  # fmt: skip


def _values(depth: Depth) -> tuple[str, ...]:
    """Random values alone would miss a split of K where the result has few digits."""
    return depth.pick(("cancelling",), ("random", "cancelling", "special"), tuple(VALUES))


def _run(form: str, tf32: bool):
    """A call on (a [.., M, K], weights [.., N, K], what is added)."""
    op, numbers = FORMS[form]

    def run(x, s):
        a, w, *c = x
        return op(*c, a, w.mT, *numbers, tf32, chosen=s)

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
