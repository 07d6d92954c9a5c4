"""What `bicompile verify` tries on the rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.kernels.rope import gpu
from bicompile.kernels.rope.schedules import SINGLE, TABLE
from bicompile.sweep import VALUES, BitClass, Depth, Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Heads of the query and of the key, size of a head.
SIZES = ((32, 8, 128), (9, 3, 64), (5, 1, 80), (2, 2, 256), (3, 2, 33))


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class."""
    yield BitClass("rope", "heads", SINGLE, TABLE, tuple(_problems(depth)))


def _problems(depth: Depth) -> Iterator[Problem]:
    tokens = depth.pick(2, 40, 300)
    values = depth.pick(("random",), ("random",), tuple(VALUES))
    rows = ((0, 1), (1, 2)) if depth is Depth.SMALL else ((0, 1), (5, 6), (1, 40))
    for dtype in DTYPES[-1:] if depth is Depth.SMALL else DTYPES:
        for h, g, d in SIZES[depth.pick(2, 0, 0) : depth.pick(3, 2, None)]:
            heads = tuple((tokens, 1, n, d) for n in (h, g))
            turns = ((tokens, 1, 1, d),) * 2
            for offset, round_first in ((0.0, True), (1.0, False))[: depth.pick(1, 1, 2)]:
                name = f"qk_norm_rope {str(dtype).removeprefix('torch.')} {tokens}x{h}+{g}x{d}"
                yield Problem(
                    name + (" 1 + w" if offset else ""), dtype,
                    (*heads, (d,), (d,), *turns), _run(offset, round_first), rows, (0, 1, 4, 5),
                    layouts=("misaligned",), values=values,
                )  # fmt: skip


def _run(offset: float, round_first: bool):
    """A call on heads of the query and of the key, their weights, cos and sin."""
    return lambda x, s: gpu.qk_norm_rope(*x, 1e-6, offset, round_first, chosen=s)
