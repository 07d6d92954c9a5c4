"""Bit checks that hold for every operation, whatever it computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from bicompile import testing
from bicompile.coverage.results import first_line

Function = Callable[..., Any]
Tensors = Sequence[torch.Tensor]

WIDE = (torch.float32, torch.bfloat16, torch.float16)
SHORT = (torch.bfloat16, torch.float16)
MOST_SEARCHED = 64
"""Choices of an axis for each input that are tried to find the rows of an operation."""


class NotThere(Exception):
    """PyTorch itself has not the operation: not in this release, or not on this device."""


def check(
    function: Function,
    tensors: Tensors,
    *,
    value: bool = True,
    device: str = "cpu",
) -> list[str]:
    """Compile a function and compare its bits with those of other ways to run it.

    Args:
        function: of tensors; it returns tensors in any nest.
        tensors: its inputs; each run gets copies.
        value: whether the values mean anything, as those of torch.empty do not.
        device: where the compiled code and eager PyTorch run; inputs and results stay on the CPU.

    Returns:
        the names of the checks that were made.

    Raises:
        InvarianceViolation: two runs that must agree bit for bit do not.
        AssertionError: the values are not those of eager PyTorch.
        NotThere: PyTorch itself does not run it on this device, or cannot capture it.
    """
    with torch.no_grad():
        eager = _eagerly(function, copies(tensors), device) if value else None
        run = _compiled(function, device)
        expected = _captured(run, function, copies(tensors), device)
        if not value:
            return []
        assert_right(function, tensors, expected, eager)
        same(run(*copies(tensors)), expected, "second run")
        with testing.num_threads(2):
            same(run(*copies(tensors)), expected, "2 threads")
        done = ["value", "run", "threads"]
        for layout, what in (("misaligned", "alignment"), ("reversed strides", "strides")):
            if (given := _arranged(function, tensors, layout)) is None:
                continue
            with suppress(NotThere):
                same(_captured(run, function, given, device), expected, layout)
                done.append(what)
        rows = find_rows(function, tensors)
        if rows is not None:
            _check_rows(run, tensors, rows, parts(expected))
            done += ["batch size", "position", "neighbours"]
        if any(t.dim() for t in tensors):
            run = _compiled(function, device, dynamic=True)
            with suppress(NotThere):
                found = _captured(run, function, copies(tensors), device, dynamic=True)
                same(found, expected, "dynamic shapes")
                if rows is not None:
                    _check_some(run, tensors, rows, _some(rows.size), parts(expected))
                done.append("dynamic shapes")
    return done


def pytorch_fails(
    function: Function, tensors: Tensors, device: str = "cpu", *, dynamic: bool = False
) -> bool:
    """Whether the same capture fails without us."""
    torch.compiler.reset()
    backend = "aot_eager_decomp_partition"
    run = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    try:
        with torch.no_grad():
            run(*(moved(t, device) for t in copies(tensors)))
    except Exception:
        return True
    return False


def _captured(
    run: Function, function: Function, tensors: Tensors, device: str, *, dynamic: bool = False
) -> Any:
    """What the compiled function returns.

    Raises:
        NotThere: it fails, and so does PyTorch's own capture.
    """
    try:
        return run(*tensors)
    except Exception as error:
        if pytorch_fails(function, tensors, device, dynamic=dynamic):
            raise NotThere(f"PyTorch cannot trace it: {first_line(error)}") from error
        raise


def _compiled(function: Function, device: str, dynamic: bool = False) -> Function:
    torch.compiler.reset()
    run = torch.compile(function, backend="batch_invariant", fullgraph=True, dynamic=dynamic)

    def there(*tensors: torch.Tensor) -> Any:
        result = run(*(moved(t, device) for t in tensors))
        if device == "cuda":
            torch.cuda.synchronize()  # what was copied to the CPU without waiting is there, too
        return moved(result, "cpu")

    return there


def _eagerly(function: Function, tensors: Tensors, device: str) -> Any:
    """The result of eager PyTorch on a device, on the CPU.

    Raises:
        NotThere: PyTorch runs it on a CPU only, or not in this dtype.
    """
    try:
        return moved(function(*(moved(t, device) for t in tensors)), "cpu")
    except (RuntimeError, IndexError) as error:
        raise NotThere(first_line(error)) from error


def moved(x: Any, device: str) -> Any:
    """All tensors of a nest on a device, with the strides and the alignment that they have."""
    return tree_map(lambda t: _moved(t, device) if _tensor(t) else t, x)


def _moved(t: torch.Tensor, device: str) -> torch.Tensor:
    if t.device.type == device or t.layout is not torch.strided:
        return t.to(device)
    if t.is_conj() or t.is_neg():
        return t.resolve_conj().resolve_neg().to(device)
    memory = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).to(device)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def copies(tensors: Tensors) -> list[torch.Tensor]:
    """The same tensors, so that a function may write to them; views keep their strides."""
    return [t.clone() if _plain(t) else t for t in tensors]


def _plain(t: torch.Tensor) -> bool:
    return t.layout is torch.strided and t.is_contiguous()


def _arranged(function: Function, tensors: Tensors, layout: str) -> list[torch.Tensor] | None:
    """The tensors in another layout, if that means the same to eager PyTorch."""
    given = [testing.LAYOUTS[layout](t) if _plain(t) else t for t in tensors]
    try:
        same(function(*given), function(*copies(tensors)), layout)
    except testing.InvarianceViolation:  # rounded otherwise, or the operation reads the strides
        wide = [widened(t) for t in tensors]
        moved = [testing.LAYOUTS[layout](t) if _plain(t) else t for t in wide]
        found, expected = parts(function(*moved)), parts(function(*copies(wide)))
        if not all(map(_close, found, expected)):
            return None
    except RuntimeError:
        return None
    return given


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding in float64."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


def _some(size: int) -> list[int]:
    """Rows in an order in which no reversal or rotation keeps them."""
    return [size - 1, 0, 1] if size > 2 else [1]


def same(actual: Any, expected: Any, what: str) -> None:
    """Compare the tensors of two results bit by bit; complex numbers as their two parts."""
    testing.assert_same_bits(parts(actual), parts(expected), what)


def parts(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, complex ones as pairs of real numbers."""
    found = [t.resolve_conj().resolve_neg() for t in tree_leaves(result) if _tensor(t)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in found]


def _tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Rows:
    """Where the rows of an operation lie: an axis of each input and output, None without rows."""

    size: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]

    def select(self, tensors: Tensors, axes: Sequence[int | None], at: Any) -> list[torch.Tensor]:
        """The rows `at` of some tensors."""
        index = torch.tensor(at)
        return [
            t.clone() if a is None else t.index_select(a, index)
            for t, a in zip(tensors, axes, strict=True)
        ]


def find_rows(function: Function, tensors: Tensors) -> Rows | None:
    """Search for rows that eager PyTorch computes each by itself, up to rounding.

    What an operation reduces over is not told by its name; so each choice of an axis of equal size
    is tried in float64, whether the function of some rows gives these rows of its result.
    """
    if any(not _plain(t) for t in tensors):
        return None
    wide = [widened(t) for t in tensors]
    try:
        full = parts(function(*copies(wide)))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    floating = (t.shape for t in tensors if t.is_floating_point())
    for size in sorted({s for shape in floating for s in shape if s > 1}, reverse=True):
        options = [[*(a for a, s in enumerate(t.shape) if s == size), None] for t in tensors]
        for axes in itertools.islice(itertools.product(*options), MOST_SEARCHED):
            if any(a is not None for a in axes):
                outputs = _rows_of_outputs(function, wide, full, Rows(size, axes, ()))
                if outputs is not None:
                    return Rows(size, axes, outputs)
    return None


def _rows_of_outputs(
    function: Function, tensors: Tensors, full: Tensors, rows: Rows
) -> tuple[int | None, ...] | None:
    """The axes of the results along which some rows, and one alone, are rows of the whole."""
    found: tuple[int | None, ...] | None = None
    for at in (_some(rows.size), [rows.size - 1]):
        try:
            alone = parts(function(*rows.select(tensors, rows.inputs, at)))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        if len(alone) != len(full):
            return None
        try:
            axes = tuple(_row_axis(a, f, at, rows.size) for a, f in zip(alone, full, strict=True))
        except _NoRowsError:
            return None
        if all(a is None for a in axes) or found not in (None, axes):
            return None
        found = axes
    return found


class _NoRowsError(Exception):
    """One result is not rows of another."""


def _row_axis(alone: torch.Tensor, full: torch.Tensor, at: Sequence[int], size: int) -> int | None:
    """The axis along which one result is rows of another, None if they are equal."""
    if alone.dim() != full.dim() or alone.dtype is not full.dtype:
        raise _NoRowsError
    if alone.shape == full.shape and torch.equal(alone, full):
        return None
    for axis, (few, many) in enumerate(zip(alone.shape, full.shape, strict=True)):
        if (few, many) == (len(at), size) and _close(
            alone, full.index_select(axis, torch.tensor(at))
        ):
            return axis
    raise _NoRowsError


def _check_rows(run: Function, tensors: Tensors, rows: Rows, expected: Tensors) -> None:
    """A row beside NaN, inf and huge values, and alone."""
    last = rows.size - 1
    for bad in (float("nan"), float("inf"), 3e4):
        given = [_spoiled(t, axis, last, bad) for t, axis in zip(tensors, rows.inputs, strict=True)]
        found = rows.select(parts(run(*given)), rows.outputs, [last])
        same(found, rows.select(expected, rows.outputs, [last]), f"neighbours {bad}")
    _check_some(run, tensors, rows, [last], expected)


def _check_some(
    run: Function, tensors: Tensors, rows: Rows, at: list[int], expected: Tensors
) -> None:
    found = run(*rows.select(tensors, rows.inputs, at))
    wanted = rows.select(expected, rows.outputs, at)
    same(found, wanted, f"rows {at} of {rows.size}")


def _spoiled(t: torch.Tensor, axis: int | None, keep: int, bad: float) -> torch.Tensor:
    """A tensor whose rows before `keep` are filled."""
    t = t.clone()
    if axis is not None and t.is_floating_point():
        t.narrow(axis, 0, keep).fill_(bad)
    return t


# ----------------------------------------------------------------------------------------- values


def assert_right(function: Function, tensors: Tensors, result: Any, eager: Any) -> None:
    """The error of a result against float64 is of the size of eager PyTorch's own.

    Raises:
        AssertionError: with both errors.
    """
    pairs = list(zip(parts(result), parts(eager), strict=True))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape, f"{[*ours.shape]} is not {[*theirs.shape]}"
        assert ours.dtype is theirs.dtype, f"{ours.dtype} is not {theirs.dtype}"
    try:
        exact = parts(function(*tree_map(widened, copies(tensors))))
    except RuntimeError:  # not implemented in float64
        exact = [theirs for _, theirs in pairs]
    for number, ((ours, theirs), true) in enumerate(zip(pairs, exact, strict=True)):
        if ours.shape != true.shape:
            continue
        if not ours.is_floating_point() and any(t.dtype in SHORT for t in tensors):
            continue  # positions of equal numbers, of which there are many
        own, others = error(ours, true), error(theirs, true)
        eps = torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0.0
        assert own <= 4 * others + 8 * eps, (
            f"output {number}: relative error {own:.2g}, of eager PyTorch {others:.2g}"
        )


def widened(x: Any) -> Any:
    """A tensor of our dtypes in float64."""
    return x.double() if _tensor(x) and x.dtype in WIDE else x


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest error, as a part of the largest value; where both are not finite, none."""
    if not found.numel():
        return 0.0
    found, true = found.double(), true.double()
    alike = (found == true) | (found.isnan() & true.isnan())
    difference = (found - true).abs().masked_fill(alike, 0.0)
    scale = true.abs().masked_fill(~true.isfinite(), 0.0).max().clamp_min(1e-30)
    return float((difference.nan_to_num(torch.inf) / scale).max())
