"""What an op promises, as data: which axes it has, which of them are rows and which are reduced.

Axis letters, the same everywhere in this project::

    B batch   M rows   N columns   H heads   Q query length   C channels
    K reduced   S key length   D head size   G groups

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


ROLES: Mapping[str, Role] = {
    **dict.fromkeys("BMNHQ", Role.ROW),
    **dict.fromkeys("KSDCG", Role.REDUCED),
}

HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TensorArg:
    """A tensor of a signature: its name, its axes and whether it may be left out."""

    name: str
    axes: tuple[str, ...]
    optional: bool = False


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
    """

    signature: str
    params: Mapping[str, object] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    indices: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)

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
        return tuple(dict.fromkeys(a for arg in self.inputs for a in arg.axes))

    @cached_property
    def row_axes(self) -> tuple[str, ...]:
        """The axes whose elements are independent in every output."""
        return tuple(
            a
            for a in self.axes
            if a != "1" and ROLES[a[0]] is Role.ROW and all(a in out for out in self.outputs)
        )

    @cached_property
    def _sides(self) -> tuple[str, str]:
        left, arrow, right = self.signature.partition("->")
        if not arrow:
            raise RegistrationError(name=self.signature, reason="a signature has one '->'")
        return left, right


def _parse(part: str) -> TensorArg:
    name, colon, axes = part.partition(":")
    name = name.strip()
    if not colon or not name:
        raise RegistrationError(name=part.strip(), reason="an input reads 'name: AXES'")
    unknown = [a for a in axes.split() if a != "1" and a[0] not in ROLES]
    if unknown:
        raise RegistrationError(name=name, reason=f"unknown axis letters {unknown}")
    return TensorArg(name.removesuffix("?"), tuple(axes.split()), name.endswith("?"))


@dataclass(frozen=True)
class Contract:
    """The cases and dtypes of an op."""

    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = HALF_AND_FLOAT
