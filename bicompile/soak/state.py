"""What a search has done and found, in a small database: killed at any moment, it loses nothing.

A block of cases is written in one transaction when it is whole: a case counts once or not at all.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bicompile.errors import StateDiffers

_TABLES = """
CREATE TABLE IF NOT EXISTS identity (what TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS blocks (
    subject TEXT, block INTEGER, cases INTEGER, seconds REAL, laws TEXT,
    PRIMARY KEY (subject, block)
);
CREATE TABLE IF NOT EXISTS failures (
    subject TEXT, number INTEGER, law TEXT, message TEXT, PRIMARY KEY (subject, number)
);
"""


@dataclass(frozen=True)
class Failure:
    """A case that found something.

    Args:
        subject: an op or a model.
        number: of the case.
        law: what was broken.
        message: what differs, and lines that reproduce it.
    """

    subject: str
    number: int
    law: str
    message: str


@dataclass(frozen=True)
class Block:
    """Some cases of one subject that were run.

    Args:
        subject: an op or a model.
        block: its number.
        laws: how many cases of each law.
        seconds: how long they took.
        failures: what they found.
    """

    subject: str
    block: int
    laws: Mapping[str, int]
    seconds: float
    failures: tuple[Failure, ...] = ()

    @property
    def cases(self) -> int:
        """How many were run."""
        return sum(self.laws.values())


class State:
    """The database of a search.

    Args:
        file: where it is kept; None: in memory alone.
        identity: of the program; a file of another one is refused.

    Raises:
        StateDiffers: the file holds cases of another program.
    """

    def __init__(self, file: Path | None, identity: Mapping[str, str]) -> None:
        self.connection = sqlite3.connect(file or ":memory:")
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.executescript(_TABLES)
        known = dict(self.connection.execute("SELECT what, value FROM identity"))
        changed = [
            f"{k}: {known[k]}, here {v}" for k, v in identity.items() if known.get(k, v) != v
        ]
        if changed:
            raise StateDiffers(file=file, differences="; ".join(changed))
        with self.connection:
            rows = [*identity.items()]
            self.connection.executemany("INSERT OR IGNORE INTO identity VALUES (?, ?)", rows)

    def add(self, block: Block) -> None:
        """Write a block down, with all that it found, or not at all."""
        laws = json.dumps(dict(block.laws))
        row = (block.subject, block.block, block.cases, block.seconds, laws)
        found = [(f.subject, f.number, f.law, f.message) for f in block.failures]
        with self.connection:
            self.connection.execute("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", row)
            self.connection.executemany("INSERT INTO failures VALUES (?, ?, ?, ?)", found)

    def done(self) -> dict[str, set[int]]:
        """Subject -> its blocks that are done."""
        found: dict[str, set[int]] = defaultdict(set)
        for subject, block in self.connection.execute("SELECT subject, block FROM blocks"):
            found[subject].add(block)
        return found

    @property
    def cases(self) -> int:
        """How many cases were run."""
        (count,) = self.connection.execute("SELECT coalesce(sum(cases), 0) FROM blocks").fetchone()
        return int(count)

    def counts(self) -> dict[str, Counter[str]]:
        """Subject -> law -> cases."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for subject, laws in self.connection.execute("SELECT subject, laws FROM blocks"):
            found[subject].update(json.loads(laws))
        return found

    def rates(self) -> dict[str, float]:
        """Subject -> cases a second of one process."""
        found = "SELECT subject, sum(cases) / sum(seconds) FROM blocks GROUP BY subject"
        return {name: round(rate or 0.0, 2) for name, rate in self.connection.execute(found)}

    def failures(self) -> Sequence[Failure]:
        """All that was found."""
        rows = self.connection.execute("SELECT * FROM failures ORDER BY subject, number")
        return [Failure(*row) for row in rows]

    def summary(self) -> dict[str, Any]:
        """All of it, for JSON."""
        (seconds,) = self.connection.execute("SELECT sum(seconds) FROM blocks").fetchone()
        return {
            "identity": dict(self.connection.execute("SELECT what, value FROM identity")),
            "cases": self.cases,
            "seconds": round(seconds or 0.0, 1),
            "subjects": {name: dict(laws) for name, laws in sorted(self.counts().items())},
            "cases a second of one process": self.rates(),
            "failures": [vars(f) for f in self.failures()],
        }
