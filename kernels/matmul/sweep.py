"""What `bicompile verify` tries on the matmul kernels: every schedule of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.kernels.common.launch import capability
from bicompile.kernels.matmul import gpu
from bicompile.kernels.matmul.schedules import SINGLE, kinds
from bicompile.kernels.matmul.table import schedules
from bicompile.sweep import VALUES, BitClass, Depth, Problem

#: kind -> dtypes, the first where little is tried.
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "double": (torch.float32,),
    "ieee": (torch.float32,),
}

#: (M, K, N): sizes below, at and beyond the edges of tiles; K with and without a tail.
SIZES = {
    Depth.SMALL: ((20, 72, 40), (20, 70, 33)),
    Depth.QUICK: ((130, 576, 136), (70, 777, 33)),
    Depth.FULL: (
        (304, 576, 264), (129, 777, 48), (300, 2048, 320), (300, 576, 257), (2500, 1000, 64),
        (130, 8200, 130), (17, 64, 16), (5, 3, 7),
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
    here = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for kind in kinds(here):
        problems = _pairs if kind.endswith(" pair") else _problems
        found = tuple(problems(kind.removesuffix(" pair"), depth))
        yield BitClass("matmul", kind, SINGLE[kind], schedules(kind, here), found)


def _pairs(kind: str, depth: Depth) -> Iterator[Problem]:
    """Two products that share their left side."""
    small, full = depth is Depth.SMALL, depth is Depth.FULL
    for dtype in DTYPES[kind] if full else DTYPES[kind][-1:] if small else DTYPES[kind][:1]:
        for m, k, n in SIZES[depth]:
            rows = tuple(r for r in ROWS if r[1] <= m)
            yield Problem(
                f"swiglu {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (n, k)),
                lambda x, s, kind=kind: gpu.swiglu(x[0], x[1].mT, x[2].mT, kind == "tf32", s),
                rows[1:3] if small else rows, layouts=LAYOUTS[: depth.pick(1, 1, 2)],
                values=_values(depth),
            )  # fmt: skip


def _problems(kind: str, depth: Depth) -> Iterator[Problem]:
    small, full = depth is Depth.SMALL, depth is Depth.FULL
    tf32 = kind == "tf32"
    for dtype in DTYPES[kind][-1:] if small else DTYPES[kind] if full else DTYPES[kind][:1]:
        for number, (m, k, n) in enumerate(SIZES[depth]):
            rows = tuple(r for r in ROWS if r[1] <= m)
            yield Problem(
                f"mm {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k)), _run("mm", tf32),
                rows[1:3] if small else rows, values=_values(depth),
                layouts=LAYOUTS[: depth.pick(1, 1, None if number < 2 else 1)],
            )  # fmt: skip
            if number < depth.pick(1, 1, 2):
                yield Problem(
                    f"linear {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (n,)),
                    _run("linear", tf32), rows[:2], values=("random", "ties"),
                )  # fmt: skip
            if number < depth.pick(0, 0, 2):
                yield Problem(
                    f"addmm {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (m, n)),
                    _run("addmm", tf32), rows[:2], (0, 2), values=("random", "ties"),
                )  # fmt: skip
                yield Problem(
                    f"mm_add {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (n, k), (m, n)),
                    _mm_add(tf32), rows[:2], (0, 2), values=("random", "ties"),
                )  # fmt: skip
                yield Problem(
                    f"qkv_proj {_name(dtype)} {min(m, 100)}x{k}x{n}", dtype,
                    ((min(m, 100), k), (n, k), (n // 16 * 8, k), (n, k)), _qkv_proj(tf32),
                    rows[:2], values=("random", "ties"),
                )  # fmt: skip
                yield Problem(
                    f"grouped_mm {_name(dtype)} {m}x{k}x{n}", dtype, ((m, k), (4, n, k)),
                    _grouped_mm(tf32), values=("random", "ties"),
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


def _mm_add(tf32: bool):
    return lambda x, s: gpu.mm_add(x[0], x[1].mT, x[2], tf32, chosen=s)


def _grouped_mm(tf32: bool):
    def run(x, s):
        a, w = x
        ends = [len(a) // 3, len(a) // 3, len(a) // 2 + 1, max(len(a) - 5, len(a) // 2 + 1)]
        offs = torch.tensor(ends, dtype=torch.int32, device=a.device)
        return gpu.grouped_mm(a, w.mT, offs, tf32, chosen=s)

    return run


def _qkv_proj(tf32: bool):
    def run(x, s):
        a, *weights = x
        return gpu.qkv_proj(a, *(w.mT for w in weights), None, None, None, tf32, chosen=s)

    return run


def _run(form: str, tf32: bool):
    """A call on (a [.., M, K], weights [.., N, K], what is added)."""
    op, numbers = FORMS[form]

    def run(x, s):
        a, w, *c = x
        return op(*c, a, w.mT, *numbers, tf32, chosen=s)

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
