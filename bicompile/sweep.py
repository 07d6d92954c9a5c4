"""Sweeps: every schedule of a bit class against the single one, on sizes and values that hurt.

A family declares its sweep in ``kernels/<family>/sweep.py``: a function ``classes(depth)`` that
yields a `BitClass` per key of its table of schedules.  `check` runs one problem of a class; which
problems are run where is the business of `bicompile.verify`.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bicompile import testing
from bicompile.errors import SweepFailed

Tensors = tuple[torch.Tensor | None, ...]
Outputs = tuple[torch.Tensor, ...]


class Depth(enum.Enum):
    """How much a sweep tries."""

    SMALL = "small"
    """A few small sizes, for Triton's interpreter."""
    QUICK = "quick"
    """Every schedule, on few sizes and the values that tell most: to be done in a minute."""
    FULL = "full"
    """Everything: what a certificate needs."""

    def pick(self, small: Any, quick: Any, full: Any) -> Any:
        """The value for this depth."""
        return {Depth.SMALL: small, Depth.QUICK: quick, Depth.FULL: full}[self]


@dataclass(frozen=True)
class Problem:
    """One call, which every schedule has to answer with the same bits.

    Args:
        name: the op, the dtype and the sizes.
        dtype: of the values.
        shapes: of the input tensors; None is an absent one.
        run: called with the tensors and a schedule; returns a tensor or several.
        rows: ranges of rows that are also computed alone, and must have the bits they have among
            all; a row is an index of `axis` in the outputs and in the tensors `with_rows`.
        layouts: names in `bicompile.testing.LAYOUTS`: all inputs are laid out like that as well.
        values: names in `VALUES`.
        prepare: called with the tensors before they are used (to make a mask of one, for example).
        parts: into how many parts the calls are cut, for as many processes: more than one where a
            kernel takes seconds to compile.
    """

    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...] | None, ...]
    run: Callable[[Tensors, Any], Any]
    rows: tuple[tuple[int, int], ...] = ()
    with_rows: tuple[int, ...] = (0,)
    axis: int = 0
    layouts: tuple[str, ...] = ()
    values: tuple[str, ...] = ("random",)
    prepare: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    parts: int = 1


@dataclass(frozen=True)
class BitClass:
    """Schedules that are to give equal bits: those of one key of a family's table.

    Args:
        family: the folder below ``kernels/``.
        name: the key, as the family's `schedule` hands it to `bicompile.certificate.choose`.
        single: the schedule that serves every size, which the others are held against.
        schedules: all schedules of the key.
        problems: what they are tried on.
    """

    family: str
    name: str
    single: Any
    schedules: Sequence[Any]
    problems: Sequence[Problem]

    @property
    def others(self) -> list[Any]:
        """The schedules besides the single one, each once."""
        return [s for s in dict.fromkeys(self.schedules) if s != self.single]


def classes(module: str, depth: Depth) -> list[BitClass]:
    """The bit classes that a module declares."""
    return list(importlib.import_module(module).classes(depth))


# --------------------------------------------------------------------------------------- values


def _random(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Mixed magnitudes and exact zeros."""
    x = torch.randn(shape, generator=g) * torch.randn(shape, generator=g).exp()
    return torch.where(torch.rand(shape, generator=g) < 0.05, 0.0, x)


def _cancelling(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Large terms of both signs around small ones: what is left depends on the order of adding."""
    sign = torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0
    large = torch.rand(shape, generator=g) < 0.5
    return torch.where(large, sign * 1024.0, torch.randn(shape, generator=g))


def _wide(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Exponents over a large part of the range, so that sums lose, overflow and underflow."""
    low, high = (-14, 8) if dtype is torch.float16 else (-70, 60)
    x = torch.randn(shape, generator=g)
    return x * torch.exp2(torch.rand(shape, generator=g) * (high - low) + low)


def _subnormal(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Around the smallest normal number."""
    return torch.randn(shape, generator=g) * torch.finfo(dtype).tiny


def _special(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Ordinary rows, and some that hold NaN, infinities of one or both signs, or overflow."""
    x = _random(shape, dtype, g)
    rows, largest = x.view(-1, x.shape[-1]), torch.finfo(dtype).max
    bad = ((torch.nan,), (torch.inf,), (torch.inf, -torch.inf), (largest, largest), (-torch.inf,))
    for row in range(0, len(rows), 3):
        for value in bad[row // 3 % len(bad)]:
            rows[row, int(torch.randint(0, x.shape[-1], (), generator=g))] = value
    return x


def _ties(shape: Sequence[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Few significant digits: sums lie half-way between two results; zeros of both signs."""
    x = torch.randint(-4, 5, shape, generator=g) / 8.0
    x = x + torch.finfo(dtype).eps * torch.randint(-1, 2, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.05, -0.0, x)


VALUES: dict[str, Callable[[Sequence[int], torch.dtype, torch.Generator], torch.Tensor]] = {
    "random": _random,
    "cancelling": _cancelling,
    "wide": _wide,
    "subnormal": _subnormal,
    "special": _special,
    "ties": _ties,
}


def make(problem: Problem, values: str, device: str) -> Tensors:
    """The inputs of a problem: the first holds the named values, the others are tame with them."""
    seed = int.from_bytes(hashlib.sha256(f"{problem.name} {values}".encode()).digest()[:7], "big")
    g = torch.Generator().manual_seed(seed)
    tame = "random" if values in ("special", "wide") else values
    tensors = tuple(
        None
        if shape is None
        else VALUES[tame if i else values](shape, problem.dtype, g).to(device, problem.dtype)
        for i, shape in enumerate(problem.shapes)
    )
    return problem.prepare(tensors)


# --------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Difference:
    """Where a schedule left its class.

    Args:
        family, bit_class, schedule, problem: what was run.
        call: the values, the rows and the layout.
        text: the first differing element with both bit patterns, or why the schedule does not run.
        runs: whether it ran at all.
    """

    family: str
    bit_class: str
    schedule: str
    problem: str
    call: str
    text: str
    runs: bool = True


@dataclass
class Outcome:
    """What a problem showed: how many results of each schedule were compared, and what differed.

    The digest is of the bits of the single schedule's results.
    """

    cases: int = 0
    digest: str = ""
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a sweep found out about a bit class.

    Args:
        family, bit_class: which one.
        single: the schedule the others were held against.
        schedules: all that were tried.
        outcome: what was seen.
        failure: the first problem that could not be tried to its end.
    """

    family: str
    bit_class: str
    single: str
    schedules: tuple[str, ...]
    outcome: Outcome
    failure: SweepFailed | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The schedules with equal bits; none after a failure, or if the single one has others."""
        out = {d.schedule for d in self.outcome.differences}
        if self.failure or self.single in out:
            return ()
        return tuple(s for s in self.schedules if s not in out)

    @property
    def splits(self) -> list[Difference]:
        """The differences in bits."""
        return [d for d in self.outcome.differences if d.runs]


def check(bit_class: BitClass, problem: Problem, device: str, part: int = 0) -> Outcome:
    """Run a part of a problem on every schedule of its class and compare with the single one.

    A schedule is dropped at its first difference, and where the machine has not the resources.
    """
    outcome, digest = Outcome(), hashlib.sha256()
    alive = [bit_class.single, *bit_class.others]

    def drop(schedule: Any, call: str, text: str, runs: bool) -> None:
        where = bit_class.family, bit_class.name, repr(schedule), problem.name
        outcome.differences.append(Difference(*where, call, text, runs))
        alive.remove(schedule)

    for values in problem.values:
        tensors = make(problem, values, device)
        whole = _run(problem, tensors, bit_class.single)
        if isinstance(whole, str):
            drop(bit_class.single, f"{values} values, all rows", whole, runs=False)
            break
        digest.update("".join(map(name_of_bits, whole)).encode())
        chosen = itertools.islice(calls(problem, tensors, whole), part, None, problem.parts)
        for call, given, expected in chosen:
            results = {schedule: _run(problem, given, schedule) for schedule in alive}
            for schedule, text in _differences(results, expected).items():
                runs = text is not results[schedule]
                drop(schedule, f"{values} values, {call}", text, runs)
            outcome.cases += 1
    outcome.digest = digest.hexdigest()
    return outcome


def calls(
    problem: Problem, tensors: Tensors, whole: Outputs
) -> Iterator[tuple[str, Tensors, Outputs]]:
    """The whole problem, then rows of it and other layouts, each with what must come out."""
    yield "all rows", tensors, whole
    for name in problem.layouts:
        yield f"all rows, {name}", _arranged(tensors, name), whole
    for number, (start, stop) in enumerate(problem.rows):
        part = tuple(
            t if t is None or i not in problem.with_rows else _rows(t, problem.axis, start, stop)
            for i, t in enumerate(tensors)
        )
        expected = tuple(_rows(t, problem.axis, start, stop) for t in whole)
        yield f"rows {start} to {stop - 1}", part, expected
        if problem.layouts:
            name = problem.layouts[number % len(problem.layouts)]
            yield f"rows {start} to {stop - 1}, {name}", _arranged(part, name), expected


def _rows(tensor: torch.Tensor, axis: int, start: int, stop: int) -> torch.Tensor:
    """A view: its alignment is that of its first row."""
    return tensor.narrow(axis, start, stop - start)


def _arranged(tensors: Tensors, layout: str) -> Tensors:
    return tuple(t if t is None else testing.LAYOUTS[layout](t) for t in tensors)


def _run(problem: Problem, tensors: Tensors, schedule: Any) -> Outputs | str:
    """The results, or why the schedule does not run on this machine."""
    from triton.runtime.errors import OutOfResources

    try:
        with _poisoned_memory():
            result = problem.run(tensors, schedule)
    except OutOfResources as error:
        return str(error)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN: else an element nobody writes may hold what the last schedule left."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _differences(results: Mapping[Any, Outputs | str], expected: Outputs) -> dict[Any, str]:
    """Of each schedule that did not run, or has other bits, why, or the first that differ.

    The device is waited for once, not once per schedule: other processes use it, too.
    """
    found = {schedule: r for schedule, r in results.items() if isinstance(r, str)}
    ran = {schedule: r for schedule, r in results.items() if not isinstance(r, str)}
    if ran:
        differ = torch.stack([_differ(outputs, expected) for outputs in ran.values()]).tolist()
        for (schedule, outputs), one_differs in zip(ran.items(), differ, strict=True):
            if one_differs:
                found[schedule] = _difference(outputs, expected)
    return found


def _differ(actual: Outputs, expected: Outputs) -> torch.Tensor:
    """Whether any bits differ, as a tensor on the device [], which is not waited for."""
    alike = len(actual) == len(expected) and all(
        a.shape == e.shape and a.dtype is e.dtype for a, e in zip(actual, expected, strict=True)
    )
    if not alike:
        return torch.ones((), dtype=torch.bool, device=expected[0].device)
    pairs = zip(actual, expected, strict=True)
    return torch.stack([(testing.bits(a) != testing.bits(e)).any() for a, e in pairs]).any()


def _difference(actual: Outputs, expected: Outputs) -> str:
    """The first element that differs."""
    try:
        testing.assert_same_bits(actual, expected, "bits")
    except testing.InvarianceViolation as error:
        return str(error)
    raise AssertionError("the bits were seen to differ")


def name_of_bits(x: torch.Tensor) -> str:
    """A short name for the bits of a tensor, found where it lies.

    Multilinear hashing modulo 2 ** 64 with random factors, first of runs of 4096 elements.
    """
    words = testing.bits(x).long().flatten()
    words = torch.nn.functional.pad(words, (0, -len(words) % 4096)).view(-1, 4096)
    for _ in range(2):
        g = torch.Generator().manual_seed(0)
        factors = torch.randint(-(1 << 63), (1 << 63) - 1, words.shape[-1:], generator=g)
        words = (words * factors.to(words.device)).sum(-1)
    return f"{int(words) & (1 << 64) - 1:016x}"


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of all problems of a class as one; of each schedule the first difference."""
    found = sorted((d for o in outcomes for d in o.differences), key=lambda d: not d.runs)
    first: dict[str, Difference] = {}
    for difference in found:
        first.setdefault(difference.schedule, difference)
    names = dict.fromkeys(o.digest for o in outcomes)  # all parts of a problem have the same
    digest = hashlib.sha256("".join(names).encode()).hexdigest()
    return Outcome(sum(o.cases for o in outcomes), digest, list(first.values()))
