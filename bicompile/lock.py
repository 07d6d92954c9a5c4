"""Lock files: what a program's bits depend on, written down to be held against another machine.

A file holds the pins (versions, machine, settings, sources), the distinct steps with their orders,
the sequence of steps as numbers of these, and a digest of all.  Source lines and sizes are not part
of it, so it survives edits that change no number.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bicompile.errors import LockDiffers, LockUnreadable
from bicompile.program import Step
from bicompile.report import digest

if TYPE_CHECKING:
    from bicompile.explanation import Explanation

FORMAT = 1


@dataclass(frozen=True)
class Lock:
    """The pins and the steps of a program."""

    title: str
    pins: dict[str, str]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, explanation: Explanation) -> Lock:
        """The lock of a program that was explained here."""
        steps = tuple(step for graph in explanation.graphs for step in graph.program)
        return cls(explanation.title, explanation.pins, steps)

    @property
    def digest(self) -> str:
        """One word for all that decides bits."""
        parts = [repr(sorted(self.pins.items())), *(repr(step.aspects()) for step in self.steps)]
        return digest(parts)

    def write(self, path: Path) -> None:
        """Write the lock as JSON, one step a line: lines of a diff are steps that changed."""
        kinds = list(dict.fromkeys(json.dumps(_plain(step)) for step in self.steps))
        numbers = {kind: i for i, kind in enumerate(kinds)}
        sequence = [numbers[json.dumps(_plain(step))] for step in self.steps]
        document = {
            "format": FORMAT,
            "program": self.title,
            "digest": self.digest,
            "pins": self.pins,
            "kinds": "KINDS",
            "steps": "STEPS",
        }
        listed = "[\n  " + ",\n  ".join(kinds) + "\n ]"
        text = json.dumps(document, indent=1)
        text = text.replace('"KINDS"', listed).replace('"STEPS"', json.dumps(sequence))
        path.write_text(text + "\n")

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lock file.

        Raises:
            LockUnreadable: there is none, or it was edited.
        """
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
            kinds = [_step(kind) for kind in document["kinds"]]
            steps = tuple(kinds[number] for number in document["steps"])
            lock = cls(document["program"], document["pins"], steps)
            if lock.digest != document["digest"]:
                raise ValueError("its digest does not belong to its content")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LockUnreadable(file=path, reason=reason) from error
        return lock

    def check(self, path: Path) -> None:
        """Hold this program on this machine against a lock file.

        Raises:
            LockDiffers: other bits are possible; every pin that differs and the first step that
                does are named.
            LockUnreadable: the file is no lock file.
        """
        from bicompile.comparison import differences

        found = differences(Lock.read(path), self)
        if found:
            listed = "\n".join(f"  {difference}" for difference in found)
            raise LockDiffers(file=path, differences=listed)


def _plain(step: Step) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(step).items() if k != "where"}


def _step(kind: dict[str, Any]) -> Step:
    reads = tuple(tuple(read) for read in kind["reads"])
    where = kind["op"]
    return Step(**kind | {"reads": reads, "where": where})
