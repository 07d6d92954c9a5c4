"""The properties of a batch-invariant program, by name; each is two ways to compute some rows.

A property is called with a `Batch` and `choose`, which draws the details of a case: in a search
from a Hypothesis strategy, in a reproduction from what was printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bicompile.certificate import random_schedules
from bicompile.testing import language
from bicompile.testing.kernels import LAYOUTS, num_threads
from bicompile.testing.processes import OTHER_PROCESS, rows_elsewhere
from bicompile.testing.subject import Batch, Run, compiled, compiled_anew, floats

Choose = Callable[[str, st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Property:
    """A property of a program.

    Args:
        meaning: what holds, in one sentence.
        check: gives the two runs whose rows must have equal bits.
        applies: whether it can be checked on a subject.
        least: the smallest batch that can show it.
        cases: so many are tried, if the search is not told otherwise.
        by_name: whether it is checked only where it is named, because it takes long.
    """

    meaning: str
    check: Callable[[Batch, Choose], tuple[Run, Run]]
    applies: Callable[[Batch], bool] = lambda batch: True
    least: int = 1
    cases: int = 20
    by_name: bool = False


def _whole(batch: Batch, rows: Any = None) -> Run:
    return batch.run(f"in the batch of {batch.size}", range(batch.size) if rows is None else rows)


def _batch_size(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    count = choose("count", st.integers(1, batch.size - 1))
    start = choose("start", st.integers(0, batch.size - count))
    rows = range(start, start + count)
    what = f"row {start} alone" if count == 1 else f"rows {start} to {rows[-1]} alone"
    return _whole(batch, rows), batch.take(rows).run(what, range(count))


def _position(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    by = choose("by", st.integers(1, batch.size - 1))
    moved = batch.take([(i - by) % batch.size for i in range(batch.size)])
    at = [(i + by) % batch.size for i in range(batch.size)]
    return _whole(batch), moved.run(f"with all rows moved on by {by}", at)


def _permutation(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    order = list(choose("order", st.permutations(range(batch.size))))
    at = [order.index(i) for i in range(batch.size)]
    return _whole(batch), batch.take(order).run(f"with the rows in the order {order}", at)


NEIGHBOURS: Mapping[str, Callable[[torch.dtype], float]] = {
    "zero": lambda dtype: 0.0,
    "huge": lambda dtype: torch.finfo(dtype).max,
    "inf": lambda dtype: torch.inf,
    "nan": lambda dtype: torch.nan,
}
"""What the other rows are filled with, besides random values."""


def _neighbours(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    row = choose("row", st.integers(0, batch.size - 1))
    kinds = ("random", *NEIGHBOURS) if floats(batch.inputs) else ("random",)
    kind = choose("neighbours", st.sampled_from(kinds))
    if kind == "random":
        seed = choose("their seed", st.integers(1, 2**16))
        others = _beside(batch, Batch.made(batch.subject, batch.size, seed, batch.length), row)
    else:
        others = batch.map(lambda t, axis: _filled(t, axis, row, NEIGHBOURS[kind]))
    return _whole(batch, [row]), others.run(f"among {kind} neighbours", [row])


def _beside(batch: Batch, others: Batch, row: int) -> Batch:
    """The row of one batch among the rows of another."""
    mine = batch.take([row])
    names = iter(_leaves(mine))

    def put(t: torch.Tensor, axis: int) -> torch.Tensor:
        return t.index_copy(axis, torch.tensor([row], device=t.device), next(names))

    mixed = others.map(put)
    shared = {n: v for n, v in batch.inputs.items() if batch.subject.axes.get(n, 0) is None}
    return replace(mixed, inputs={**mixed.inputs, **shared})


def _leaves(batch: Batch) -> list[torch.Tensor]:
    """The tensors with a batch axis, in the order in which `Batch.map` meets them."""
    found: list[torch.Tensor] = []
    batch.map(lambda t, axis: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _filled(
    t: torch.Tensor, axis: int, row: int, value: Callable[[torch.dtype], float]
) -> torch.Tensor:
    if not t.is_floating_point():
        return t
    at = torch.tensor([row], device=t.device)
    return torch.full_like(t, value(t.dtype)).index_copy(axis, at, t.index_select(axis, at))


def _strides(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    name = choose("layout", st.sampled_from(sorted(LAYOUTS)))
    laid_out = batch.map(lambda t, axis: LAYOUTS[name](t))
    return _whole(batch), laid_out.run(f"from inputs with {name}", range(batch.size))


def _repeated_run(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    return _whole(batch), batch.run("computed a second time", range(batch.size))


def _threads(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    count = choose("threads", st.integers(1, 4))
    rows = range(batch.size)
    return (
        batch.run("with one thread", rows, lambda: num_threads(1)),
        batch.run(f"with {count} threads", rows, lambda: num_threads(count)),
    )


def _static_and_dynamic(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    subject, rows = batch.subject, range(batch.size)

    def run(dynamic: bool) -> Callable[[], Any]:
        def compute() -> Any:
            with compiled_anew():
                call = compiled(subject.function, subject.backend, dynamic)
                return subject.results(subject.run(batch.inputs, call), batch.size, rows)

        return compute

    return (
        Run("compiled for dynamic shapes", run(True)),
        Run("compiled for static shapes", run(False)),
    )


def _other_schedule(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    seed = choose("schedules", st.integers(0, 2**16))
    rows = range(batch.size)
    other = batch.run("on schedules drawn at random", rows, lambda: random_schedules(seed))
    return _whole(batch), other


def _other_process(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    return _whole(batch), Run("in another process", lambda: rows_elsewhere(batch))


def _train_and_eval(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    subject, rows = batch.subject, range(batch.size)

    def run(training: bool) -> Callable[[], Any]:
        def compute() -> Any:
            with _mode(subject.function, training):
                found = subject.run(batch.inputs, gradients=training)
                return subject.results(found, batch.size, rows)

        return compute

    return (
        Run("of inference (eval, without gradients)", run(False)),
        Run("of a forward pass in training", run(True)),
    )


@contextlib.contextmanager
def _mode(module: Any, training: bool) -> Iterator[None]:
    """A module in training without dropout, or in inference; then as it was."""
    before = [(m, m.training) for m in module.modules()]
    dropouts = [(m, m.p) for m in module.modules() if isinstance(m, _DropoutNd)]
    module.train(training)
    for dropout, _ in dropouts:
        dropout.p = 0.0
    try:
        yield
    finally:
        for part, was in before:
            part.training = was
        for dropout, p in dropouts:
            dropout.p = p


def _is_trained(batch: Batch) -> bool:
    """A module with parameters to train, none of whose statistics are over the batch."""
    module = batch.subject.function
    return (
        isinstance(module, torch.nn.Module)
        and any(p.requires_grad for p in module.parameters())
        and not any(isinstance(m, _BatchNorm) for m in module.modules())
    )


def _is_on(kind: str) -> Callable[[Batch], bool]:
    return lambda batch: all(t.device.type == kind for t in _leaves(batch))


PROPERTIES: Mapping[str, Property] = {
    "batch size": Property(
        "Some rows alone have the bits that they have in a larger batch.", _batch_size, least=2
    ),
    "position": Property("A row has the same bits at every position.", _position, least=2),
    "permutation": Property("Rows in another order have their bits.", _permutation, least=2),
    "neighbours": Property(
        "Whatever the other rows hold (random values, zeros, the largest number, infinity, NaN), "
        "a row keeps its bits.",
        _neighbours,
        least=2,
    ),
    "strides": Property(
        "Strides, storage offsets and alignment of the inputs change no bit.", _strides
    ),
    "repeated run": Property("The same call again gives the same bits.", _repeated_run, cases=5),
    "threads": Property(
        "The number of CPU threads changes no bit.", _threads, _is_on("cpu"), cases=8
    ),
    "static and dynamic": Property(
        "Code compiled for one shape gives the bits of code that serves all.",
        _static_and_dynamic,
        lambda batch: isinstance(batch.subject.backend, str) and batch.subject.backend != "eager",
        cases=2,
    ),
    "other schedule": Property(
        "The tiles, warps and stages of our GPU kernels change no bit.",
        _other_schedule,
        lambda batch: batch.subject.backend == "batch_invariant" and _is_on("cuda")(batch),
        cases=5,
    ),
    OTHER_PROCESS: Property(
        "A fresh interpreter gives the same bits.",
        _other_process,
        lambda batch: isinstance(batch.subject.backend, str),
        cases=2,
        by_name=True,
    ),
    "train and eval": Property(
        "A forward pass in training, without dropout, has the bits of inference.",
        _train_and_eval,
        _is_trained,
        cases=5,
    ),
    "padding": Property(
        "Padding on the left or the right changes no bit of a row's tokens.",
        language.padding,
        language.is_language_model,
    ),
    "chunks": Property(
        "A prompt computed in chunks into a cache has the bits of one piece.",
        language.chunks,
        language.has_cache,
    ),
    "decode": Property(
        "A prompt and then token by token has the bits of one piece.",
        language.decode,
        language.has_cache,
        cases=5,
    ),
    "cache": Property(
        "A static cache of any size has the bits of no cache.", language.cache, language.has_cache
    ),
    "prefix": Property(
        "A prefix that was computed in another batch may be reused.",
        language.prefix,
        language.has_cache,
    ),
}
"""Name -> property; a search checks all that apply and need not be named."""
