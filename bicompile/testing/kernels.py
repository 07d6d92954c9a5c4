"""Properties of the kernels, derived from their contracts.

A property takes an op (the registered one, or a planted variant that must fail) and a `Sample`, and
raises `InvarianceViolation` naming the first element whose bits differ.  Bits are compared, never
values within a tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bicompile.contract import ROLES, Case, Role, TensorArg, Window, single
from bicompile.registry import Kernel
from bicompile.testing.bits import assert_same_bits, outputs
from bicompile.testing.contents import CONTENTS

Op = Callable[..., Any]


# --------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """One call of a kernel: sizes of the axes and the tensors."""

    kernel: Kernel
    case: Case
    dtype: torch.dtype
    sizes: Mapping[str, int]
    tensors: Mapping[str, torch.Tensor | None]

    def arguments(self, tensors: Mapping[str, torch.Tensor | None] | None = None) -> list[Any]:
        """The arguments in the order of the op's schema."""
        values: dict[str, Any] = {**self.case.params, **(tensors or self.tensors)}
        if "dtype" in values and values["dtype"] is None:
            values["dtype"] = self.dtype
        found = (values[a.name] for a in self.kernel.op._schema.arguments)
        return [v(self.sizes) if callable(v) else v for v in found]

    def run(self, op: Op, tensors: Mapping[str, torch.Tensor | None] | None = None) -> Any:
        """Call `op` on the sample, or on other tensors in its place."""
        return op(*self.arguments(tensors))

    def select(self, axis: str, index: torch.Tensor) -> Sample:
        """The sample with only the elements `index` along `axis`; runs along it become shorter."""
        tensors = {
            arg.name: None
            if (t := self.tensors[arg.name]) is None
            else (index < t[:, None]).sum(1).to(t.dtype)
            if self.case.ends.get(arg.name) == axis
            else self.pick(t, arg.axes, axis, index)
            for arg in self.case.inputs
        }
        sizes = {**self.sizes, axis: len(index)}
        return dataclasses.replace(self, tensors=tensors, sizes=sizes)

    def select_outputs(self, results: Any, axis: str, index: torch.Tensor) -> list[torch.Tensor]:
        """The same elements of the outputs."""
        return [
            self.pick(t, axes, axis, index)
            for t, axes in zip(outputs(results), self.case.outputs, strict=True)
        ]

    def pick(
        self, t: torch.Tensor, axes: tuple[str, ...], axis: str, index: torch.Tensor
    ) -> torch.Tensor:
        """The elements `index` along `axis` of a tensor with these axes, if it has that one."""
        for dim, both in enumerate(axes):
            parts = both.split("*")
            if axis in parts:
                t = t.unflatten(dim, [self.sizes[p] if len(parts) > 1 else -1 for p in parts])
                t = t.index_select(dim + parts.index(axis), index)
                return t.flatten(dim, dim + len(parts) - 1)
        return t


def make_sample(
    kernel: Kernel,
    case: Case,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    device: str = "cpu",
    absent: tuple[str, ...] = (),
    float_mask: bool = False,
    contents: str = "mixed",
) -> Sample:
    """Draw the tensors of a call; `contents` names one of `testing.contents.CONTENTS`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(sizes)
    if isinstance(groups := case.params.get("groups"), int):
        sizes["G"] = groups
        sizes["C"] = sizes["C"] * groups
    for window in case.windows.values():
        sizes[window.image] = max(sizes[window.image], window.least(sizes[window.taps]))
    tensors: dict[str, torch.Tensor | None] = {}
    for arg in case.inputs:
        shape = [
            math.prod(1 if a == "1" else sizes[a] for a in both.split("*")) for both in arg.axes
        ]
        if arg.optional and arg.name in absent:
            tensors[arg.name] = None
        elif arg.name in case.indices:
            count = max(sizes[case.indices[arg.name]], 1)
            tensors[arg.name] = torch.randint(count, shape, generator=generator).to(device)
        elif arg.name in case.ends:
            count = sizes[case.ends[arg.name]] + 1
            ends = torch.randint(count, shape, generator=generator).sort().values
            tensors[arg.name] = ends.to(device, torch.int32)
        elif arg.name in case.masks:
            visible = torch.rand(shape, generator=generator) < 0.7
            additive = torch.where(visible, torch.randn(shape, generator=generator), -torch.inf)
            tensors[arg.name] = (additive.to(dtype) if float_mask else visible).to(device)
        else:
            x = CONTENTS[contents](shape, _summed(arg), generator)
            tensors[arg.name] = x.to(device, dtype)
    return Sample(kernel, case, dtype, sizes, tensors)


def _summed(arg: TensorArg) -> int | None:
    """The first axis of a tensor that is summed over."""
    roles = [ROLES.get(both.split("*")[-1][0]) for both in arg.axes]
    return roles.index(Role.REDUCED) if Role.REDUCED in roles else None


# ------------------------------------------------------------------------------------ properties


def rows_do_not_depend_on_the_batch(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """A subset of rows in any order, down to one row, has the bits it has among all."""
    full = sample.run(op)
    generator = torch.Generator().manual_seed(seed)
    for axis in sample.case.row_axes:
        size = sample.sizes[axis]
        for count in sorted({1, 2, 3, size // 2, size - 1, size} & set(range(1, size + 1))):
            index = torch.randperm(size, generator=generator)[:count]
            if axis in sample.case.ends.values():
                index = index.sort().values  # a row stays in its run
            index = index.to(_device(sample))
            alone = sample.select(axis, index).run(op)
            expected = sample.select_outputs(full, axis, index)
            assert_same_bits(alone, expected, f"{count} of {size} along {axis}")


def rows_do_not_depend_on_neighbours(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """NaN, inf and huge values in all other rows change no bit of a row."""
    full = sample.run(op)
    for axis in sample.case.row_axes:
        size = sample.sizes[axis]
        if size < 2:
            continue
        keep = torch.tensor([seed % size], device=_device(sample))
        for bad in (float("nan"), float("inf"), torch.finfo(sample.dtype).max):
            tensors = {arg.name: _spoil(sample, arg, axis, keep, bad) for arg in sample.case.inputs}
            spoiled = sample.select_outputs(sample.run(op, tensors), axis, keep)
            expected = sample.select_outputs(full, axis, keep)
            assert_same_bits(spoiled, expected, f"neighbours along {axis} are {bad}")


def _spoil(
    sample: Sample, arg: TensorArg, axis: str, keep: torch.Tensor, bad: float
) -> torch.Tensor | None:
    """The tensor with `bad` in all elements but those of `keep` along `axis`."""
    x = sample.tensors[arg.name]
    if x is None or axis not in single(arg.axes) or not x.dtype.is_floating_point:
        return x
    numbers = torch.arange(x.numel(), device=x.device).view(x.shape)
    kept = sample.pick(numbers, arg.axes, axis, keep).reshape(-1)
    spoiled = torch.full_like(x, bad).view(-1)
    return spoiled.index_copy_(0, kept, x.reshape(-1)[kept]).view(x.shape)


def windows_do_not_depend_on_their_place(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """An image in a larger one of zeros gives the bits that it gives alone."""
    full = sample.run(op)
    generator = torch.Generator().manual_seed(seed)
    for axis, window in sample.case.windows.items():
        for _ in range(3):
            before, behind = torch.randint(20, (2,), generator=generator).tolist()
            elements, positions = window.shift(before)
            tensors = {
                arg.name: _framed(sample.tensors[arg.name], arg, window, elements, behind)
                for arg in sample.case.inputs
            }
            moved = sample.run(op, tensors)
            for got, want, axes in zip(
                outputs(moved), outputs(full), sample.case.outputs, strict=True
            ):
                d = axes.index(axis)
                part = got.narrow(d, positions, want.shape[d])
                assert_same_bits(part, want, f"{before} positions on along {axis}")


def _framed(
    x: torch.Tensor | None, arg: TensorArg, window: Window, before: int, behind: int
) -> torch.Tensor | None:
    if x is None or window.image not in arg.axes:
        return x
    d = arg.axes.index(window.image)
    zeros = (x.new_zeros((*x.shape[:d], n, *x.shape[d + 1 :])) for n in (before, behind))
    return torch.cat([next(zeros), x, next(zeros)], d)


def windows_read_nothing_else(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """NaN, inf and huge values outside a window change no bit of what it gives."""
    full = sample.run(op)
    for axis, window in sample.case.windows.items():
        axes = sample.case.outputs[0]
        position = seed % outputs(full)[0].shape[axes.index(axis)]
        first, last = window.read(position, sample.sizes[window.taps])
        elements = torch.arange(sample.sizes[window.image], device=_device(sample))
        keep = elements[(first <= elements) & (elements <= last)]
        for bad in (float("nan"), float("inf"), torch.finfo(sample.dtype).max):
            tensors = {
                arg.name: _spoil(sample, arg, window.image, keep, bad) for arg in sample.case.inputs
            }
            spoiled = sample.run(op, tensors)
            at = torch.tensor([position], device=_device(sample))
            got, want = (sample.select_outputs(out, axis, at) for out in (spoiled, full))
            assert_same_bits(got, want, f"position {position} of {axis} among {bad}")


LAYOUTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reversed strides": lambda x: _permuted(x, tuple(reversed(range(x.dim())))),
    "rotated strides": lambda x: _permuted(x, (*range(1, x.dim()), 0)),
    "misaligned": lambda x: _in_buffer(x, offset=1),
    "misaligned rows": lambda x: _padded_rows(x),
    "every second element": lambda x: _every_second(x),
}


def _permuted(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _in_buffer(x: torch.Tensor, offset: int) -> torch.Tensor:
    buffer = x.new_empty(x.numel() + offset)
    view = buffer[offset:].view(x.shape)
    view.copy_(x)
    return view


def _padded_rows(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 0:
        return x
    buffer = x.new_empty((*x.shape[:-1], x.shape[-1] + 3))
    view = buffer[..., 1 : x.shape[-1] + 1]
    view.copy_(x)
    return view


def _every_second(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 0:
        return x
    buffer = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))
    view = buffer[..., ::2]
    view.copy_(x)
    return view


def bits_do_not_depend_on_layout(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """Strides, storage offsets and alignment change no bit."""
    expected = sample.run(op)
    for name, arrange in LAYOUTS.items():
        tensors = {n: None if t is None else arrange(t) for n, t in sample.tensors.items()}
        assert_same_bits(sample.run(op, tensors), expected, f"inputs with {name}")


def bits_do_not_depend_on_the_run(op: Op, sample: Sample, *, seed: int = 0) -> None:
    """The same call again, and with another number of threads, gives the same bits."""
    expected = sample.run(op)
    assert_same_bits(sample.run(op), expected, "second run")
    for threads in (1, 2, 3):
        with num_threads(threads):
            assert_same_bits(sample.run(op), expected, f"{threads} threads")


PROPERTIES: tuple[Callable[..., None], ...] = (
    rows_do_not_depend_on_the_batch,
    rows_do_not_depend_on_neighbours,
    bits_do_not_depend_on_layout,
    bits_do_not_depend_on_the_run,
)


OF_WINDOWS: tuple[Callable[..., None], ...] = (
    windows_do_not_depend_on_their_place,
    windows_read_nothing_else,
)
"""What holds besides for ops with windows."""


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run with `count` threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(sample: Sample) -> torch.device:
    return next(t.device for t in sample.tensors.values() if t is not None)


# -------------------------------------------------------------------------------------- accuracy


def error_against_float64(op: Op, sample: Sample) -> tuple[float, float, float]:
    """Root mean square errors against the float64 reference.

    Of `op`, of PyTorch's own op, and of the true value rounded to the output's dtype.
    """
    wide = {
        n: t if t is None or not t.dtype.is_floating_point else t.double()
        for n, t in sample.tensors.items()
    }
    reference = dataclasses.replace(sample, tensors=wide)
    true = outputs(reference.run(sample.kernel.reference))[0]
    ours = outputs(sample.run(op))[0]
    torchs = outputs(sample.run(sample.kernel.eager))[0]
    errors = ((x.double() - true).nan_to_num() for x in (ours, torchs, true.to(ours.dtype)))
    ours_rms, torchs_rms, rounding = (e.square().mean().sqrt().item() for e in errors)
    return ours_rms, torchs_rms, rounding
