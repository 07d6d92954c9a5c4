"""Which schedule of the Triton matmul serves which size.

Certificates do not cover this file: it chooses among the schedules that they list. For devices with
files of times beside it: for sizes timed in whole steps (`python -m bicompile.tune_steps`) what was
fastest there, for others the schedule whose waves of tiles take least (`python -m bicompile.tune`).
For other devices by rows, what fits 99 KB of shared memory (sm_80 and later).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bicompile.certificate import choose
from bicompile.kernels.matmul.schedules import SINGLE, Schedule


@dataclass(frozen=True)
class Entry:
    """A schedule for up to `rows` rows, and what decides between it and others for as many.

    `waves`: microseconds of TERMS terms where there are a quarter as many tiles as multiprocessors,
    two quarters, .. ; beyond the last they grow evenly.
    """

    rows: int
    schedule: Schedule
    waves: tuple[float, ...] = (1.0,)

    def time(self, processors: int, m: int, n: int, k: int) -> float:
        """Microseconds of m rows, n columns and k terms, as far as it is for a choice."""
        s = self.schedule
        tiles = _ceil(m, s.bm) * _ceil(n, s.bn)
        quarters = _ceil(4 * tiles, processors)
        last = len(self.waves)
        wave = self.waves[min(quarters, last) - 1] * max(quarters / last, 1.0)
        return wave * _ceil(k, s.bk) * s.bk / TERMS


Size = tuple[str, int, int, int]

TERMS = 4096
MANY = 1 << 62
#: Rows count as the next of these, for which kernels are built ahead.
ROWS = (1, 16, 31, 32, 63, 64, 127, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)

#: kind -> entries by rising rows, for a device without measured times.
TABLE: dict[str, tuple[Entry, ...]] = {
    "half": (
        Entry(16, Schedule(16, 32, 256, 4, 4)),
        Entry(32, Schedule(32, 32, 128, 4, 4)),
        Entry(64, Schedule(64, 32, 128, 4, 4)),
        Entry(256, Schedule(64, 64, 128, 4, 3)),
        Entry(1024, Schedule(128, 64, 64, 4, 4)),
        Entry(MANY, Schedule(128, 128, 64, 8, 3)),
    ),
    "half pair": (
        Entry(16, Schedule(16, 16, 256, 4, 4)),
        Entry(64, Schedule(32, 32, 128, 4, 3)),
        Entry(MANY, Schedule(64, 64, 64, 4, 3)),
    ),
    "tf32": (
        Entry(16, Schedule(16, 16, 128, 2, 4)),
        Entry(64, Schedule(64, 32, 64, 4, 4)),
        Entry(256, Schedule(64, 64, 32, 4, 4)),
        Entry(MANY, Schedule(128, 128, 32, 8, 3)),
    ),
    "tf32 pair": (
        Entry(16, Schedule(16, 16, 64, 2, 4)),
        Entry(MANY, Schedule(64, 64, 32, 4, 3)),
    ),
    "double": (
        Entry(16, Schedule(16, 32, 128, 4, 4)),
        Entry(128, Schedule(16, 64, 64, 4, 3)),
        Entry(MANY, Schedule(64, 64, 64, 8, 3)),
    ),
    "double pair": (
        Entry(16, Schedule(16, 32, 64, 4, 4)),
        Entry(MANY, Schedule(64, 32, 32, 4, 4)),
    ),
    "ieee": (
        Entry(1, Schedule(1, 32, 32, 1, 6)),
        Entry(8, Schedule(4, 32, 32, 2, 5)),
        Entry(128, Schedule(16, 32, 32, 2, 5)),
        Entry(1024, Schedule(64, 64, 32, 4, 3)),
        Entry(MANY, Schedule(128, 128, 32, 8, 3)),
    ),
    "ieee pair": (
        Entry(8, Schedule(4, 32, 32, 2, 4)),
        Entry(MANY, Schedule(32, 32, 32, 4, 3)),
    ),
}


def schedule(
    kind: str, capability: str, processors: int, m: int, n: int, k: int, blocks: bool,
    room: int = 0, least: int = 0,
) -> Schedule:  # fmt: skip
    """The schedule for m rows, n columns and k terms.

    `blocks`: descriptors can be used. `room`: rows that can be read, if more than m. `least`: the
    columns are of several products, none of which has fewer.
    """
    found = ranked(kind, capability, processors, m, n, k, blocks, room, least)
    return choose("matmul", kind, found[-1], SINGLE[kind], lambda: found)


@functools.cache
def ranked(
    kind: str, capability: str, processors: int, m: int, n: int, k: int, blocks: bool,
    room: int = 0, least: int = 0,
) -> tuple[Schedule, ...]:  # fmt: skip
    """What could serve, the fastest last; certified or not."""
    here = [s for s in schedules(kind, capability) if blocks or not s.tma]
    here = [s for s in here if not least or s.serves_several(least)]
    entries = [e for e in table(kind, capability) if e.schedule in here]
    last = [e.schedule for e in by_time(entries, processors, m, n, k, room)]
    in_steps = steps(capability).get((kind, counted(m), n, k))
    if in_steps in here and (not in_steps.tma or in_steps.masked or in_steps.bm <= max(m, room)):
        last.append(in_steps)
    last = [s for i, s in enumerate(last) if s not in last[i + 1 :]]
    return (*(s for s in here if s not in last), *last)


def by_time(
    entries: Sequence[Entry], processors: int, m: int, n: int, k: int, room: int = 0
) -> list[Entry]:
    """The entries for m rows, the fastest last; those of whole tiles too, where there is room."""
    found = _timed(entries, processors, m, n, k)
    whole = [e for e in entries if e.schedule.tma and not e.schedule.masked]
    for rows in (r for r in ROWS if m < r <= room):
        found += _timed(whole, processors, rows, n, k)
    return [e for _, e in sorted(found, key=lambda timed: timed[0], reverse=True)]


def counted(m: int) -> int:
    """As how many rows m of them count."""
    return next((r for r in ROWS if m <= r), m)


def _timed(
    entries: Sequence[Entry], processors: int, m: int, n: int, k: int
) -> list[tuple[float, Entry]]:
    """The entries for m rows, and their times."""
    bound = min((e.rows for e in entries if m <= e.rows), default=0)
    rows = min(counted(m), ROWS[-1])
    return [(e.time(processors, rows, n, k), e) for e in entries if e.rows == bound]


@functools.cache
def table(kind: str, capability: str) -> tuple[Entry, ...]:
    """The entries for a kind on a device."""
    times = Path(__file__).with_name(f"times-sm{capability}.json")
    measured = json.loads(times.read_text())["entries"] if times.exists() else {}
    if kind not in measured:
        return TABLE[kind]
    return tuple(
        Entry(rows, Schedule(*schedule), tuple(waves)) for rows, schedule, waves in measured[kind]
    )


@functools.cache
def steps(capability: str) -> Mapping[Size, Schedule]:
    """What was fastest in the steps of models, by kind, rows (one of ROWS), columns and terms."""
    file = Path(__file__).with_name(f"steps-sm{capability}.json")
    timed = json.loads(file.read_text())["sizes"] if file.exists() else []
    return {
        (t["kind"], t["rows"], t["columns"], t["terms"]): Schedule(*t["schedule"]) for t in timed
    }


def schedules(kind: str, capability: str) -> tuple[Schedule, ...]:
    """Every schedule of a kind that runs on a device (one bit class), the single one first."""
    in_steps = (s for (of, *_), s in steps(capability).items() if of == kind)
    found = (e.schedule for e in table(kind, capability))
    return tuple(dict.fromkeys((SINGLE[kind], *found, *in_steps)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
