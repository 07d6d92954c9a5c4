"""What an op promises, as data: which axes it has, which of them are rows and which are reduced.

Axis letters, the same everywhere in this project::

    B batch   M rows   N columns   H heads   Q query length   C channels
    K reduced   S key length   D head size   G groups
    I image   W taps of a window   P positions of a window

An axis may hold two, the first of them outside: ``H*C`` is C channels for each of H groups.

A `Contract` states an op in one or more `Case`s.  A case is a signature in the manner of einops,
``"self: M K, mat2: K N -> M N"``, plus values for the arguments that are not tensors.  Checks,
fakes of fixed-rank ops, test inputs, the table in docs/ops.md and the benchmark sizes are derived
from it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bicompile.errors import RegistrationError


class Role(enum.Enum):
    """What an axis does to the elements of the output."""

    ROW = "row"
    """Elements along it are independent: any of them may be added, removed or moved."""
    REDUCED = "reduced"
    """Summed over in a pinned order; its size is part of what the bits depend on."""
    IMAGE = "image"
    """A window slides over it: an element of the output reads some of it (see `Window`)."""


ROLES: Mapping[str, Role] = {
    **dict.fromkeys("BMNHQ", Role.ROW),
    **dict.fromkeys("KSDCGW", Role.REDUCED),
    "I": Role.IMAGE,
}

HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorArg:
    """A tensor of a signature: its name, its axes and whether it may be left out."""

    name: str
    axes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Window:
    """What a position of an output axis reads of an axis of the image.

    Position p meets, by tap w, element ``p * stride + w * dilation - padding``; a transposed window
    meets the elements i with ``i * stride = p + padding - w * dilation``. Outside the image is 0.

    Args:
        image: the axis that the window slides over.
        taps: the axis of its taps.
        stride, padding, dilation: as in the formula, in elements.
        transposed: the second formula.
        extra: positions at the end beyond those that the formula gives (transposed ones only).
    """

    image: str
    taps: str
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    transposed: bool = False
    extra: int = 0

    def least(self, taps: int) -> int:
        """The smallest image with at least one position."""
        reach = self.dilation * (taps - 1) + 1
        if self.transposed:  # (i - 1) * stride + reach + extra - 2 * padding >= 1
            return max(1, 1 + -((reach + self.extra - 2 * self.padding - 1) // self.stride))
        return max(1, reach - 2 * self.padding)

    def read(self, position: int, taps: int) -> tuple[int, int]:
        """The first and the last element that a position can read."""
        reach = self.dilation * (taps - 1)
        if self.transposed:
            last = position + self.padding
            return -((reach - last) // self.stride), last // self.stride
        first = position * self.stride - self.padding
        return first, first + reach

    def shift(self, steps: int) -> tuple[int, int]:
        """By how many elements and positions the image and the output move together."""
        return (steps, steps * self.stride) if self.transposed else (steps * self.stride, steps)


@dataclass(frozen=True)
class Case:
    """One form in which an op is called.

    Args:
        signature: ``"x: M K, w?: K -> M K, M 1"``; ``?`` marks a tensor that may be None, ``1`` an
            axis of size one.
        params: the other arguments, by name, as they are passed to the op; a `dtype` of None stands
            for the dtype of the inputs, a function is called with the sizes of the axes.
        masks: names of the tensors that say which elements are visible (boolean or additive).
        indices: tensors of integers -> the axis on which each element names a position.
        ends: tensors of integers -> the axis along which they say where each run of elements ends.
        windows: axes of the output -> the windows whose positions they are.
    """

    signature: str
    params: Mapping[str, object] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    indices: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> tuple[TensorArg, ...]:
        """The tensor arguments in order."""
        return tuple(_parse(part) for part in self._sides[0].split(","))

    @cached_property
    def outputs(self) -> tuple[tuple[str, ...], ...]:
        """The axes of each output."""
        return tuple(tuple(part.split()) for part in self._sides[1].split(","))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes, in order of appearance."""
        return tuple(dict.fromkeys(a for arg in self.inputs for a in single(arg.axes)))

    @cached_property
    def row_axes(self) -> tuple[str, ...]:
        """The axes whose elements are independent in every output."""
        return tuple(
            a
            for a in self.axes
            if a != "1"
            and ROLES[a[0]] is Role.ROW
            and all(a in single(out) for out in self.outputs)
        )

    @cached_property
    def _sides(self) -> tuple[str, str]:
        left, arrow, right = self.signature.partition("->")
        if not arrow:
            raise RegistrationError(name=self.signature, reason="a signature has one '->'")
        return left, right


def single(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Axes with each that holds two taken apart: ``("B", "H*C")`` -> ``("B", "H", "C")``."""
    return tuple(a for both in axes for a in both.split("*"))


def _parse(part: str) -> TensorArg:
    name, colon, axes = part.partition(":")
    name = name.strip()
    if not colon or not name:
        raise RegistrationError(name=part.strip(), reason="an input reads 'name: AXES'")
    unknown = [a for a in single(tuple(axes.split())) if a != "1" and a[:1] not in ROLES]
    if unknown:
        raise RegistrationError(name=name, reason=f"unknown axis letters {unknown}")
    return TensorArg(name.removesuffix("?"), tuple(axes.split()), name.endswith("?"))


@dataclass(frozen=True)
class Contract:
    """The cases and dtypes of an op."""

    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT
