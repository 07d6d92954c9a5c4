"""Schedules of the Triton matmul: tiles, warps and stages by kind, rows and columns. Free: no bits.

A table is read from the top; the first entry whose bounds hold serves. Entries for "any" device fit
99 KB of shared memory (sm_80 and later).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from bicompile.certificate import choose


@dataclass(frozen=True)
class Schedule:
    """Tile of the output, step in K, warps and pipeline stages.

    With `tma` the operands are read as blocks of tensor descriptors, which needs rows that start at
    multiples of 16 bytes. `persistent`: as many programs as multiprocessors, each with many tiles.
    `parts`: column parts in which a tile is stored.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False
    parts: int = 1

    def with_pointers(self) -> Schedule:
        """The same tiles for operands that no tensor descriptor can stand for."""
        return replace(self, tma=False, persistent=False, parts=1) if self.tma else self


def _tma(bm: int, bn: int, bk: int, warps: int, stages: int, parts: int = 0) -> Schedule:
    """Read by tensor descriptors; with `parts` persistent, too."""
    return Schedule(bm, bn, bk, warps, stages, True, parts > 0, max(parts, 1))


@dataclass(frozen=True)
class Entry:
    """A schedule for up to `m` rows, `n` columns and `k` terms."""

    m: int
    n: int
    k: int
    schedule: Schedule


PART = 32  # pinned: terms of one chain of an "ieee" matmul, so its bk
FAST_DOUBLE = ("8.0", "9.0", "10.0")  # pinned: devices half as fast in float64 as in float32
MANY = 1 << 62
NARROW, WIDE = 4096, 8192  # columns that fill a device with wide tiles only for many rows

#: (kind, compute capability or "any") -> entries. "pair": two products that share their left side,
#: a tile of each.
TABLE: dict[tuple[str, str], tuple[Entry, ...]] = {
    ("half", "9.0"): (
        Entry(16, NARROW, MANY, _tma(16, 32, 512, 4, 4)),
        Entry(16, MANY, MANY, Schedule(16, 32, 256, 4, 4)),
        Entry(32, NARROW, MANY, _tma(32, 32, 256, 4, 5)),
        Entry(32, WIDE, MANY, _tma(32, 32, 256, 4, 4)),
        Entry(32, MANY, MANY, _tma(32, 128, 128, 4, 4)),
        Entry(64, NARROW, MANY, _tma(64, 32, 256, 4, 4)),
        Entry(64, MANY, MANY, _tma(64, 64, 128, 4, 5)),
        Entry(128, NARROW, MANY, _tma(128, 32, 128, 4, 5)),
        Entry(128, WIDE, MANY, _tma(128, 64, 64, 4, 8)),
        Entry(128, MANY, MANY, _tma(128, 128, 64, 8, 5, 1)),
        Entry(256, NARROW, MANY, _tma(128, 64, 64, 4, 8)),
        Entry(512, NARROW, MANY, _tma(128, 128, 64, 4, 6)),
        Entry(256, MANY, MANY, _tma(128, 128, 64, 4, 6)),
        Entry(512, WIDE, MANY, _tma(128, 256, 64, 8, 3)),
        Entry(512, MANY, MANY, _tma(128, 128, 64, 4, 6)),
        Entry(4096, 1024, MANY, _tma(128, 128, 64, 4, 6)),
        Entry(1024, NARROW, MANY, _tma(128, 256, 64, 8, 3)),
        Entry(1024, WIDE, MANY, _tma(128, 128, 64, 4, 6)),
        Entry(MANY, MANY, MANY, _tma(128, 256, 64, 8, 3)),
    ),
    ("half pair", "9.0"): (
        Entry(16, MANY, MANY, Schedule(16, 32, 256, 4, 3)),
        Entry(32, MANY, MANY, _tma(32, 32, 128, 4, 4)),
        Entry(64, MANY, MANY, _tma(64, 32, 128, 4, 4)),
        Entry(128, MANY, MANY, _tma(128, 128, 64, 8, 4)),
        Entry(256, MANY, MANY, _tma(128, 64, 64, 4, 5)),
        Entry(MANY, MANY, MANY, _tma(128, 128, 64, 8, 4)),
    ),
    ("half", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 32, 256, 4, 4)),
        Entry(32, MANY, MANY, Schedule(32, 32, 128, 4, 4)),
        Entry(64, MANY, MANY, Schedule(64, 32, 128, 4, 4)),
        Entry(256, MANY, MANY, Schedule(64, 64, 128, 4, 3)),
        Entry(1024, MANY, MANY, Schedule(128, 64, 64, 4, 4)),
        Entry(MANY, MANY, MANY, Schedule(128, 128, 64, 8, 3)),
    ),
    ("half pair", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 16, 256, 4, 4)),
        Entry(64, MANY, MANY, Schedule(32, 32, 128, 4, 3)),
        Entry(MANY, MANY, MANY, Schedule(64, 64, 64, 4, 3)),
    ),
    ("tf32", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 16, 128, 2, 4)),
        Entry(64, MANY, MANY, Schedule(64, 32, 64, 4, 4)),
        Entry(256, MANY, MANY, Schedule(64, 64, 32, 4, 4)),
        Entry(MANY, MANY, MANY, Schedule(128, 128, 32, 8, 3)),
    ),
    ("tf32 pair", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 16, 64, 2, 4)),
        Entry(MANY, MANY, MANY, Schedule(64, 64, 32, 4, 3)),
    ),
    ("double", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 32, 128, 4, 4)),
        Entry(128, MANY, MANY, Schedule(16, 64, 64, 4, 3)),
        Entry(MANY, MANY, MANY, Schedule(64, 64, 64, 8, 3)),
    ),
    ("double pair", "any"): (
        Entry(16, MANY, MANY, Schedule(16, 32, 64, 4, 4)),
        Entry(MANY, MANY, MANY, Schedule(64, 32, 32, 4, 4)),
    ),
    ("ieee", "any"): (
        Entry(1, MANY, MANY, Schedule(1, 32, 32, 1, 6)),
        Entry(8, MANY, MANY, Schedule(4, 32, 32, 2, 5)),
        Entry(128, MANY, MANY, Schedule(16, 32, 32, 2, 5)),
        Entry(1024, MANY, MANY, Schedule(64, 64, 32, 4, 3)),
        Entry(MANY, MANY, MANY, Schedule(128, 128, 32, 8, 3)),
    ),
    ("ieee pair", "any"): (
        Entry(8, MANY, MANY, Schedule(4, 32, 32, 2, 4)),
        Entry(MANY, MANY, MANY, Schedule(32, 32, 32, 4, 3)),
    ),
}


#: kind -> the schedule that serves any size: used where the others are not certified.
SINGLE = {
    "half": Schedule(64, 64, 128, 4, 3),
    "half pair": Schedule(64, 64, 64, 4, 3),
    "tf32": Schedule(64, 64, 32, 4, 4),
    "tf32 pair": Schedule(64, 64, 32, 4, 3),
    "double": Schedule(64, 64, 64, 8, 3),
    "double pair": Schedule(64, 32, 32, 4, 4),
    "ieee": Schedule(16, 32, 32, 2, 5),
    "ieee pair": Schedule(32, 32, 32, 4, 3),
}


def kind_of(dtype: torch.dtype, tf32: bool, capability: str) -> str:
    """How products are summed: "half", "tf32", and in full precision "double" or "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "double" if capability in FAST_DOUBLE else "ieee"


def kinds(capability: str) -> tuple[str, ...]:
    """The kinds of a device, with those of two products that share their left side."""
    other = kind_of(torch.float32, False, "" if capability in FAST_DOUBLE else FAST_DOUBLE[0])
    return tuple(k for k in SINGLE if k.split()[0] != other)


def table(kind: str, capability: str) -> tuple[Entry, ...]:
    """The entries for a kind on a device."""
    return TABLE.get((kind, capability)) or TABLE[kind, "any"]


def schedule(kind: str, capability: str, m: int, n: int, k: int, blocks: bool) -> Schedule:
    """The schedule for m rows, n columns and k terms; `blocks`: descriptors can be used."""

    def among() -> tuple[Schedule, ...]:
        found = schedules(kind, capability)
        return found if blocks else tuple(s for s in found if not s.tma)

    return choose("matmul", kind, wanted(kind, capability, m, n, k, blocks), SINGLE[kind], among)


@functools.cache
def wanted(kind: str, capability: str, m: int, n: int, k: int, blocks: bool) -> Schedule:
    """What the table says, certified or not."""
    entries = table(kind, capability)
    found = next(e.schedule for e in entries if m <= e.m and n <= e.n and k <= e.k)
    return found if blocks else found.with_pointers()


def schedules(kind: str, capability: str) -> tuple[Schedule, ...]:
    """Every schedule of a kind that runs on a device (one bit class), the single one first."""
    entries = (*table(kind, capability), *table(kind, "any"))
    found = [s for e in entries for s in (e.schedule, e.schedule.with_pointers())]
    return tuple(dict.fromkeys((SINGLE[kind], *found)))
