"""What `bicompile verify` tries on the attention kernels: every tile, with keys split or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bicompile.kernels.attention import gpu
from bicompile.kernels.attention.schedules import SINGLE, bit_class
from bicompile.kernels.attention.table import schedules
from bicompile.kernels.common.launch import capability
from bicompile.sweep import BitClass, Depth, Problem

#: bytes per element -> dtypes, the first where little is tried.
DTYPES = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}
#: head of a bit class -> sizes of a head (of query and key, of value): even and with a tail.
HEADS = {64: ((64, 64), (40, 24)), 128: ((128, 128), (80, 96)), 256: ((256, 256),)}
MOST_USED = (2, 128)  # the class that a quick sweep tries most on: attention compiles slowly
#: queries, keys: a chunk of a prompt and more keys than a chunk holds, decoding, prefill.
LENGTHS = {
    Depth.SMALL: ((18, 40),),
    Depth.QUICK: ((70, 600), (1, 1100)),
    Depth.FULL: ((70, 1100), (1, 1296), (608, 608), (6, 2096)),
}
#: Queries alone, as in decoding, and chunks of them.
ROWS = {
    Depth.SMALL: ((3, 17),),
    Depth.QUICK: ((3, 4),),
    Depth.FULL: ((0, 1), (3, 4), (1, 3)),
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table; one of whether the keys are split over programs."""
    here = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    splits = []
    for size, head in SINGLE:
        if depth is Depth.SMALL and (size, head) != (2, 64):
            continue
        single = SINGLE[size, head]
        problems = tuple(_problems(size, head, depth))
        splits += [p for p in _problems(size, head, depth, single) if "mask" in p.name]
        members = schedules((size, head), here)
        yield BitClass("attention", bit_class(size, head), single, members, problems)
    yield BitClass("attention", "split", False, (False, True), tuple(splits))


def _problems(size: int, head: int, depth: Depth, fixed=None) -> Iterator[Problem]:
    """Problems of a bit class; with a `fixed` schedule what varies is the split."""
    dtypes = (torch.float16,) if depth is Depth.SMALL else DTYPES[size]
    some = 1 if depth is not Depth.FULL else None
    for dtype, (d, dv) in itertools.product(dtypes[:some], HEADS[head][:some]):
        usual = dtype is not torch.float16 and d == head
        few = depth is Depth.QUICK and (size, head) != MOST_USED
        for queries, keys in LENGTHS[depth][: 1 if few else None]:
            name = f"{str(dtype).removeprefix('torch.')} {queries}x{keys} {d}x{dv}"
            for kind in ("mask",) if few else _kinds(queries, depth if usual else Depth.QUICK):
                alone = kind.endswith("mask") and queries > 1
                rows = ROWS[depth if usual else Depth.QUICK] if alone else ()
                layouts = ("misaligned",) if alone and depth is not Depth.SMALL else ()
                yield Problem(
                    f"sdpa {kind} {name}", dtype, _shapes(queries, keys, d, dv), _run(kind, fixed),
                    rows, with_rows=(0, 3), axis=2, layouts=layouts, values=_values(kind, depth),
                    prepare=_PREPARE[kind], parts=(1 + len(rows)) * (1 + len(layouts)),
                )  # fmt: skip


def _shapes(queries: int, keys: int, d: int, dv: int):
    """Query, key, value, and the numbers that a mask is made of; two query heads share a key."""
    return (2, 4, queries, d), (2, 2, keys, d), (2, 2, keys, dv), (2, 1, queries, keys)


def _kinds(queries: int, depth: Depth) -> tuple[str, ...]:
    """Forms of a call; queries of "causal" start at key 0, so decoding is another."""
    if depth is not Depth.FULL:
        return ("causal", "mask") if depth is Depth.QUICK and queries > 1 else ("mask",)
    more = ("all", "mask", "values that are not finite, mask")
    return ("causal", *more, "additive mask") if queries > 1 else more


def _values(kind: str, depth: Depth) -> tuple[str, ...]:
    if depth is not Depth.FULL:
        return ("random",)
    return ("random", "wide", "special", "ties") if kind == "mask" else ("random", "cancelling")


def _masked(tensors):
    """A mask like that of a padded prompt, with holes, and a row that sees nothing."""
    *qkv, x = tensors
    keys = torch.arange(x.shape[-1], device=x.device)
    first = torch.tensor([3, 0], device=x.device).view(2, 1, 1, 1)
    last = x.shape[-1] - x.shape[-2] + torch.arange(x.shape[-2], device=x.device)[:, None]
    mask = (keys >= first) & (keys <= last) & ((x > -1.0) | (x != x))
    mask[1, :, -1] &= x.shape[-2] == 1
    return *qkv, mask


def _added(tensors):
    *qkv, mask = _masked(tensors)
    numbers = tensors[3]
    return *qkv, torch.where(mask, numbers, -torch.inf)


def _not_finite(tensors):
    q, k, v, mask = _masked(tensors)
    v = v.clone()
    v[:, :, 5::70, 0], v[:, :, 9::90, 1], v[:, :, 11, 2] = torch.inf, -torch.inf, torch.nan
    return q, k, v, mask


_PREPARE = {
    "causal": lambda t: (*t[:3], None),
    "all": lambda t: (*t[:3], None),
    "mask": _masked,
    "additive mask": _added,
    "values that are not finite, mask": _not_finite,
}


def _run(kind: str, fixed):
    """The call, whole and split; in float32, where halves would hide differences, and rounded."""
    dtype = None if kind == "all" else torch.float32

    def run(x, s):
        q, k, v, mask = x
        schedule, splits = (s, (False, True)) if fixed is None else (fixed, (s,))
        scale = q.shape[-1] ** -0.5
        return tuple(
            gpu.sdpa(
                q, k, v, mask, kind == "causal", scale, chosen=schedule, split=split, dtype=dtype
            )
            for split in splits[: 2 if k.shape[2] > gpu.CHUNK else 1]
        )

    return run
