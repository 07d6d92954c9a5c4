"""`assert_batch_invariant`: a search for the smallest input whose rows change their bits."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seed_of
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from bicompile.capture import any_number_of_recompilations
from bicompile.errors import BicompileError, UnknownProperty
from bicompile.pool import gpu_is_lost
from bicompile.testing.bits import InvarianceViolation, assert_same_bits
from bicompile.testing.properties import PROPERTIES, Property
from bicompile.testing.subject import Batch, Function, Run, Subject, first_module

SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
PROFILES: Mapping[str, float] = {"dev": 0.25, "ci": 1, "soak": 25}
"""Profile -> how many times the usual number of cases are tried."""
Example = Mapping[str, Any]


class _OutOfTime(BaseException):
    """Ends a search; Hypothesis would take an Exception for a failure of what is tested."""


class _GpuLost(_OutOfTime):
    """The same, because of the error that it comes from."""


def assert_batch_invariant(
    function: Function,
    make_inputs: Callable[..., Mapping[str, Any]],
    *,
    axes: Mapping[str, int | None] | None = None,
    properties: Sequence[str] | None = None,
    backend: str | Function = "batch_invariant",
    max_batch_size: int = 33,
    max_length: int = 257,
    max_examples: int | None = None,
    max_seconds: float = math.inf,
    profile: str = "ci",
    example: Example | None = None,
) -> None:
    """Search for an input with which a row's bits follow anything but the row; raise if it exists.

    Batch sizes, lengths, positions, neighbours, layouts, threads and, for transformers' language
    models, padding, chunks and caches are drawn by Hypothesis, which also shrinks what it finds to
    the smallest batch, length and change. The draws are the same in every run.

    Args:
        function: a function or an nn.Module; called with keyword arguments, without gradients.
        make_inputs: called with a batch size; returns the keyword arguments, the batch axis B first
            in each tensor. If it has a parameter `length`, lengths T are searched, too.
        axes: batch axes by the name of the argument where they are not the first; None: a tensor
            without one; `return`: that of the results.
        properties: names out of `PROPERTIES`; if nothing is said, all that apply but for
            "other process", which takes seconds.
        backend: "eager", "inductor", "batch_invariant", another backend of torch.compile, or a
            callable that takes the function and returns what is called in its place (a client of a
            server, for example).
        max_batch_size: the largest B.
        max_length: the largest T.
        max_examples: so many cases of each property; what `PROPERTIES` says, if nothing is said.
        max_seconds: after which no more cases are tried; what was found by then is raised.
        profile: "ci": so many; "dev": a quarter of them; "soak": 25 times as many.
        example: only this one, as the message of a violation prints it.

    Raises:
        InvarianceViolation: two computations of a row have other bits; with the first element that
            differs, both bit patterns, and a line that reproduces it.
        UnknownProperty: there is none of that name, or it does not apply.
        NoBatchAxis: a result has no batch axis.

    Example:
        >>> weight = torch.randn(8, 64)
        >>> make = lambda batch: {"x": torch.randn(batch, 64)}
        >>> assert_batch_invariant(lambda x: x @ weight.t(), make, max_examples=3)
    """
    subject = Subject(function, make_inputs, backend, axes or {})
    end = time.perf_counter() + max_seconds
    with any_number_of_recompilations():
        if example is not None:
            _replay(subject, example)
            return
        for name in _chosen(properties, subject, max_batch_size):
            cases = max_examples or math.ceil(PROPERTIES[name].cases * PROFILES[profile])
            search(subject, name, most=max_batch_size, longest=max_length, cases=cases, end=end)


def _chosen(names: Sequence[str] | None, subject: Subject, most: int) -> list[str]:
    """The properties that are named, or all that apply and need not be named."""
    found = applying(subject, most)
    for name in names or ():
        if name not in PROPERTIES:
            raise UnknownProperty(name=name, reason="there is none", accepted=list(PROPERTIES))
        if name not in found:
            reason = "it does not apply to what is tested"
            raise UnknownProperty(name=name, reason=reason, accepted=found)
    if names is None:
        return [n for n in found if not PROPERTIES[n].by_name]
    return list(names)


def applying(subject: Subject, most: int) -> list[str]:
    """The properties that apply to batches of up to `most` rows."""
    batch = Batch.made(subject, 1, 0, 1 if subject.takes_length else None)
    return [n for n, p in PROPERTIES.items() if p.least <= most and p.applies(batch)]


def search(
    subject: Subject,
    name: str,
    *,
    most: int,
    longest: int,
    cases: int,
    draws: int | None = None,
    end: float = math.inf,
) -> None:
    """Try so many cases of a property; the last that is tried after a failure is the smallest.

    Args:
        subject: what is tested.
        name: of the property.
        most: the largest batch.
        longest: the largest length.
        cases: so many are tried.
        draws: which ones: the same for the same number; None stands for one more such number.
        end: of `time.perf_counter`, after which no case is begun.

    Raises:
        InvarianceViolation: two computations of a row have other bits.
    """
    least = PROPERTIES[name].least
    sizes = st.sampled_from([n for n in SIZES if least <= n <= most] or [most])
    lengths = st.sampled_from([n for n in LENGTHS if n <= longest] or [longest])
    smallest: InvarianceViolation | None = None

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=draws is None,
        report_multiple_bugs=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        nonlocal smallest
        if time.perf_counter() >= end:
            raise _OutOfTime
        size = data.draw(st.integers(least, most) | sizes)
        length = data.draw(st.integers(1, longest) | lengths) if subject.takes_length else None
        seed = data.draw(st.integers(0, 2**16))
        drawn: dict[str, Any] = {"property": name, "batch": size, "seed": seed}
        if length is not None:
            drawn["length"] = length

        def choose(what: str, strategy: st.SearchStrategy[Any]) -> Any:
            drawn[what] = data.draw(strategy)
            return drawn[what]

        try:
            _compare(subject, PROPERTIES[name], drawn, choose)
        except InvarianceViolation as violation:
            smallest = violation
            raise
        except Exception as error:
            if gpu_is_lost():  # where every case that follows fails, too
                raise _GpuLost from error
            raise

    try:
        (attempt if draws is None else seed_of(draws)(attempt))()
    except (InvarianceViolation, BicompileError) as error:
        error.__notes__ = []  # what Hypothesis adds speaks of its own draws
        raise
    except _GpuLost as lost:
        assert lost.__cause__
        raise lost.__cause__ from None
    except (_OutOfTime, Flaky):  # after the end, Hypothesis misses the draws that were not made
        if time.perf_counter() < end:
            raise
        if smallest is not None:
            smallest.__notes__ = []
            raise smallest from None


def _replay(subject: Subject, example: Example) -> None:
    _compare(subject, PROPERTIES[example["property"]], example, lambda what, _: example[what])


def _compare(
    subject: Subject, prop: Property, drawn: Example, choose: Callable[[str, Any], Any]
) -> None:
    batch = Batch.made(subject, drawn["batch"], drawn["seed"], drawn.get("length"))
    one, other = prop.check(batch, choose)
    try:
        assert_same_bits(other.compute(), one.compute(), other.what)
    except InvarianceViolation as violation:
        found = InvarianceViolation(_message(subject, drawn, one, other, str(violation)))
        found.example = dict(drawn)
        raise found from None


def _message(subject: Subject, drawn: Example, one: Run, other: Run, what: str) -> str:
    backend = repr(subject.backend) if isinstance(subject.backend, str) else "<the callable>"
    lines = [
        f"{drawn['property']}: other bits {other.what} than {one.what}",
        f"  {what}",
    ]
    if start := first_module(subject, one, other):
        lines.append(f"  it starts in {start}")
    lines += [
        f"  backend {backend}, torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"{torch.get_num_threads()} CPU threads",
        "  to reproduce it, call assert_batch_invariant with the same function and make_inputs and",
        f"    backend={backend}, example={dict(drawn)!r}",
    ]
    return "\n".join(lines)
