"""A fault as data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the tests that are to fail after it.

    Args:
        name: of the fault, in a few words.
        file: below the root of the repository.
        old, new: the text that is replaced; it stands in the file once.
        breaks: what no longer holds.
        tests: arguments of pytest: files and options.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Says whether a result is of this edit and these tests."""
        parts = (self.file, self.old, self.new, *self.tests)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def apply(self, tree: Path) -> None:
        """Make the edit in a copy of the repository.

        Raises:
            ValueError: the old text does not stand there once.
        """
        path = tree / self.file
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text stands {count} times in {self.file}")
        path.write_text(text.replace(self.old, self.new))


def laws(kernels: str) -> tuple[str, ...]:
    """The laws of some kernels."""
    return ("tests/test_kernels.py", "-k", kernels)
