"""What is tested: a function or module under a backend, and how its rows are found."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from bicompile.errors import NoBatchAxis
from bicompile.testing.bits import assert_same_bits

Function = Callable[..., Any]
Inputs = dict[str, Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]
BACKENDS = ("eager", "inductor", "batch_invariant")
RETURN = "return"
"""Key of `axes` for the results."""


def compiled(function: Function, backend: str | Function, dynamic: bool | None = None) -> Function:
    """A function or module under a backend: the name of one, or what makes a callable of it.

    Example:
        >>> compiled(torch.relu, "eager") is torch.relu
        True
    """
    if callable(backend):
        wrapped: Function = backend(function)
        return wrapped
    if backend == "eager":
        return function
    forward = function.forward if isinstance(function, torch.nn.Module) else function
    forward = getattr(forward, "bicompile_original", forward)
    if backend == "batch_invariant":
        import bicompile

        # A method is compiled as a function: the module of the user stays as it is.
        return bicompile.compile(lambda **kwargs: forward(**kwargs), dynamic=dynamic)
    return torch.compile(forward, backend=backend, dynamic=dynamic)


@dataclass
class Subject:
    """A function under a backend.

    Args:
        function: a function or an nn.Module, called with keyword arguments.
        make_inputs: called with a batch size (and a `length`, if it takes one).
        backend: a name out of BACKENDS, another backend of torch.compile, or a callable.
        axes: name of an argument -> its batch axis, None if it has none; `return` -> that of the
            results. What is not named has the batch first, if its first axis is as long.
    """

    function: Function
    make_inputs: Callable[..., Mapping[str, Any]]
    backend: str | Function = "batch_invariant"
    axes: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.call = compiled(self.function, self.backend)

    @property
    def takes_length(self) -> bool:
        """Whether `make_inputs` makes rows of a chosen length."""
        return "length" in inspect.signature(self.make_inputs).parameters

    def inputs(self, batch: int, seed: int, length: int | None = None) -> Inputs:
        """What `make_inputs` makes after `torch.manual_seed(seed)`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            more = {} if length is None else {"length": length}
            return dict(self.make_inputs(batch, **more))

    def run(
        self, inputs: Mapping[str, Any], call: Function | None = None, *, gradients: bool = False
    ) -> Any:
        """The results for some inputs, in memory of their own; `gradients`: could be followed."""
        with torch.set_grad_enabled(gradients):
            results = (call or self.call)(**inputs)
        # A CUDA graph writes its next results to the same place.
        return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, results)

    def take(self, inputs: Mapping[str, Any], batch: int, rows: Sequence[int]) -> Inputs:
        """The inputs of some rows."""
        return self.map(inputs, batch, lambda t, axis: _select(t, axis, rows))

    def map(
        self,
        inputs: Mapping[str, Any],
        batch: int,
        change: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> Inputs:
        """The inputs with each tensor that has a batch axis changed."""

        def changed(value: Any, axis: int | None) -> Any:
            return tree_map(lambda t: change(t, axis or 0) if _has(t, axis, batch) else t, value)

        return {name: changed(value, self.axes.get(name, 0)) for name, value in inputs.items()}

    def results(self, results: Any, batch: int, rows: Sequence[int]) -> list[torch.Tensor]:
        """The rows of the results.

        Raises:
            NoBatchAxis: a result has none.
        """
        axis = self.axes.get(RETURN, 0)
        found = []
        for number, t in enumerate(_tensors(results)):
            if not _has(t, axis, batch):
                shape = ", ".join(map(str, t.shape))
                raise NoBatchAxis(number=number, shape=shape, batch=batch, axis=axis)
            found.append(_select(t, axis or 0, rows))
        return found


def _has(t: object, axis: int | None, batch: int) -> bool:
    return (
        isinstance(t, torch.Tensor)
        and axis is not None
        and t.dim() > axis
        and t.shape[axis] == batch
    )


def _select(t: torch.Tensor, axis: int, rows: Sequence[int]) -> torch.Tensor:
    return t.index_select(axis, torch.tensor(rows, device=t.device))


def _tensors(results: Any) -> list[torch.Tensor]:
    """The tensors of a result; caches and other objects in it are not compared."""
    return [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]


@dataclass(frozen=True)
class Batch:
    """Inputs of so many rows.

    Args:
        subject: what they are for.
        size: the number of rows.
        length: of each row, if it was chosen.
        inputs: keyword arguments.
    """

    subject: Subject
    size: int
    length: int | None
    inputs: Inputs

    @classmethod
    def made(cls, subject: Subject, size: int, seed: int, length: int | None) -> Batch:
        """Inputs as `make_inputs` makes them."""
        return cls(subject, size, length, subject.inputs(size, seed, length))

    def take(self, rows: Sequence[int]) -> Batch:
        """Some rows alone."""
        return replace(self, size=len(rows), inputs=self.subject.take(self.inputs, self.size, rows))

    def map(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Batch:
        """Each tensor with a batch axis changed; `change` is called with it and the axis."""
        return replace(self, inputs=self.subject.map(self.inputs, self.size, change))

    def run(self, what: str, rows: Sequence[int], around: Context = contextlib.nullcontext) -> Run:
        """A run of which some rows are looked at."""

        def compute() -> list[torch.Tensor]:
            with around():
                return self.subject.results(self.subject.run(self.inputs), self.size, rows)

        return Run(what, compute, self.inputs, tuple(rows))


@dataclass(frozen=True)
class Run:
    """One of two computations of the same rows.

    Args:
        what: how the rows are computed, in a few words.
        compute: gives the rows.
        inputs: of the call, where it is one call of the subject; rows: which rows it gives.
    """

    what: str
    compute: Callable[[], Any]
    inputs: Mapping[str, Any] | None = None
    rows: tuple[int, ...] = ()


def first_module(subject: Subject, one: Run, other: Run) -> str:
    """The first submodule whose results have other bits in the rows, if eager modules run."""
    module = subject.function
    if subject.backend != "eager" or not isinstance(module, torch.nn.Module):
        return ""
    if one.inputs is None or other.inputs is None:
        return ""
    seen = [_results_of_modules(subject, module, run.inputs or {}) for run in (one, other)]
    for name, (kind, left) in seen[0].items():
        if name not in seen[1]:
            continue
        try:
            assert_same_bits(_rows(seen[1][name][1], other.rows), _rows(left, one.rows), name)
        except AssertionError:
            return f"{name} ({kind})"
        except IndexError:
            continue  # it is not of rows
    return ""


def _rows(results: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    return [_select(t, 0, rows) for t in results if t.dim()]


def _results_of_modules(
    subject: Subject, module: torch.nn.Module, inputs: Mapping[str, Any]
) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Name -> class and results of each submodule without children, in the order of the calls."""
    seen: dict[str, tuple[str, list[torch.Tensor]]] = {}
    with contextlib.ExitStack() as stack:
        for name, child in module.named_modules():
            if not name or next(child.children(), None) is not None:
                continue

            def keep(child: torch.nn.Module, _: Any, results: Any, name: str = name) -> None:
                flat = [t.clone() for t in _tensors(results)]
                seen.setdefault(name, (type(child).__name__, flat))

            stack.callback(child.register_forward_hook(keep).remove)
        subject.run(inputs)
    return seen


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Forget what torch.compile knows, before and after."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def floats(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point tensors of some inputs."""
    return [t for t in _tensors(inputs) if t.is_floating_point()]
