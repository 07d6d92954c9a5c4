"""`bicompile.compare`: whether two programs give the same numbers, or where they part.

Trainer against sampler, static against dynamic shapes, a lock file against this machine: compared
are what the bits depend on besides the graph (`bicompile.pins`) and the steps that round, in order
(`bicompile.program`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bicompile.lock import Lock
from bicompile.program import Step

if TYPE_CHECKING:
    from bicompile.explanation import Explanation


@dataclass(frozen=True)
class Difference:
    """One thing in which two programs differ.

    Args:
        aspect: "pin", or what differs in a step: op, order, arguments, rounding or reads.
        where: the name of the pin, or the node and source line in both programs.
        first: what the first program has.
        second: what the second program has.
    """

    aspect: str
    where: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.aspect}: {self.where}\n    {self.first}\n    {self.second}"


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: true where the numbers are the same.

    Args:
        steps: how many steps agree, up to the first that does not.
        pins: what both programs depend on, with the common values.
        differences: pins that differ, then the first step that does.
    """

    steps: int
    pins: Mapping[str, str]
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether the programs give the same numbers for the same rows."""
        return not self.differences

    def __bool__(self) -> bool:
        return self.same

    def text(self) -> str:
        """The answer in words."""
        if not self.same:
            listed = "\n".join(map(str, self.differences))
            return f"not the same numbers; the first {self.steps} steps agree\n{listed}"
        pinned = "\n".join(f"  {name}: {value}" for name, value in self.pins.items())
        return f"the same numbers: {self.steps} steps agree, by these pins\n{pinned}"


def compare(first: Explanation | str | Path, second: Explanation | str | Path) -> Comparison:
    """Say whether two programs give the same numbers for the same rows, or where they part.

    Args:
        first: the result of `bicompile.explain`, or the path of a lock file.
        second: the same.

    Bits:
        equal steps under equal pins give equal bits, whatever the sizes of the batches, the lengths
        of the sequences and the schedules are.  What the programs are fed is not compared.

    Raises:
        LockUnreadable: a path is not that of a lock file.

    Example:
        >>> import torch, bicompile
        >>> model, x = torch.nn.Linear(8, 4), torch.randn(5, 8)
        >>> bool(compare(bicompile.explain(model, x), bicompile.explain(model, x, dynamic=True)))
        True
    """
    one, two = (
        Lock.of(x) if not isinstance(x, (str, Path)) else Lock.read(Path(x))
        for x in (first, second)
    )
    pins = {name: value for name, value in one.pins.items() if two.pins.get(name) == value}
    return Comparison(_agreed(one.steps, two.steps), pins, tuple(differences(one, two)))


def differences(one: Lock, two: Lock) -> list[Difference]:
    """The pins that differ, then the first step that does."""
    names = dict.fromkeys([*one.pins, *two.pins])
    values = [(n, one.pins.get(n, "absent"), two.pins.get(n, "absent")) for n in names]
    found = [Difference("pin", name, a, b) for name, a, b in values if a != b]
    agreed = _agreed(one.steps, two.steps)
    if agreed < max(len(one.steps), len(two.steps)):
        found.append(_parting(one.steps, two.steps, agreed))
    return found


def _agreed(one: Sequence[Step], two: Sequence[Step]) -> int:
    """How many steps from the start on are the same."""
    pairs = zip(one, two, strict=False)
    agreed = 0
    for a, b in pairs:
        if a.aspects() != b.aspects():
            break
        agreed += 1
    return agreed


def _parting(one: Sequence[Step], two: Sequence[Step], at: int) -> Difference:
    """The first step that differs: one that the other program lacks, or another in some aspect."""
    a, b = (steps[at] if at < len(steps) else None for steps in (one, two))
    if a is None or b is None:
        return _lacking(a or b, "second" if a is None else "first")
    if _follows(a, two[at:]) and not _follows(b, one[at:]):
        return _lacking(b, "second")
    if _follows(b, one[at:]) and not _follows(a, two[at:]):
        return _lacking(a, "first")
    x, y = a.aspects(), b.aspects()
    aspect = next(name for name in x if x[name] != y[name])
    where = a.where if a.where == b.where else f"{a.where}  |  {b.where}"
    return Difference(aspect, where, f"{a.op}: {x[aspect]}", f"{b.op}: {y[aspect]}")


def _follows(step: Step, steps: Sequence[Step]) -> bool:
    """Whether a step comes within the next few, so that those before it are additional."""
    return any(step.op == other.op and step.dtypes == other.dtypes for other in steps[1:4])


def _lacking(step: Step | None, owner: str) -> Difference:
    assert step is not None
    return Difference("op", step.where, f"only the {owner} program has", step.op)
