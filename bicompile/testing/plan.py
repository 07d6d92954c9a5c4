"""Cases of ops, numbered: sizes, contents and law of a case follow from its number alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bicompile.contract import ROLES, Contract, Role
from bicompile.testing import kernels
from bicompile.testing.bits import InvarianceViolation
from bicompile.testing.contents import CONTENTS
from bicompile.testing.sizes import axis_sizes

LAWS: Mapping[str, Callable[..., None]] = {
    law.__name__: law for law in (*kernels.PROPERTIES, *kernels.OF_WINDOWS)
}


@dataclass(frozen=True)
class Plan:
    """One case of an op.

    Args:
        op: its name in the registry.
        law: name of a law of `LAWS`.
        case: which of the cases of its contract.
        dtype: of its floating-point tensors.
        sizes: of the axes.
        contents: a key of `testing.contents.CONTENTS`.
        seed: of the numbers in the tensors.
        absent: optional tensors that are None.
        float_mask: whether a mask is additive.
    """

    op: str
    law: str
    case: int
    dtype: str
    sizes: Mapping[str, int]
    contents: str = "mixed"
    seed: int = 0
    absent: tuple[str, ...] = ()
    float_mask: bool = False

    def check(self, device: str = "cpu") -> None:
        """Hold the op to the law.

        Raises:
            InvarianceViolation: it breaks it; with the first element and both bit patterns.

        Example:
            >>> Plan("sum", "bits_do_not_depend_on_layout", 0, "float32", {"M": 3, "K": 70}).check()
        """
        from bicompile import native, registry

        registry.load_all()
        if device == "cpu":
            native.load()
        kernel = registry.find(self.op)
        sample = kernels.make_sample(
            kernel,
            kernel.contract.cases[self.case],
            getattr(torch, self.dtype),
            self.sizes,
            seed=self.seed,
            device=device,
            absent=self.absent,
            float_mask=self.float_mask,
            contents=self.contents,
        )
        LAWS[self.law](kernel.op, sample, seed=self.seed)

    def call(self, device: str = "cpu") -> str:
        """The lines that check it again."""
        return f"from bicompile.testing.plan import Plan\n{self!r}.check({device!r})"


_SIZES_OF_ROWS = 3  # of cases that are alike


def plan(op: str, contract: Contract, number: int, alike: int = 1) -> Plan:
    """Case `number` of an op with this contract; the same in every process and version of Python.

    Args:
        op: its name.
        contract: what it promises.
        number: of the case.
        alike: so many cases from each multiple on share what GPU kernels are compiled for: form,
            dtype, law, what is absent, sizes that are summed over, and a few sizes of rows.

    Example:
        >>> from bicompile import registry
        >>> contract = registry.load_all()["sum"].contract
        >>> plan("sum", contract, 7) == plan("sum", contract, 7)
        True
    """
    shared, draw = (random.Random(f"{op}@{n}") for n in (f"{number // alike} of {alike}", number))
    which = shared.randrange(len(contract.cases))
    case = contract.cases[which]
    crowded, windows = len(case.axes) > 3, len(case.windows)
    sizes = {}
    for axis in (a for a in case.axes if a != "1"):
        known = axis_sizes(axis, crowded, windows)
        several = _SIZES_OF_ROWS if ROLES[axis[0]] is Role.ROW else 1
        sizes[axis] = draw.choice([shared.choice(known) for _ in range(several)])
    laws = [law.__name__ for law in kernels.PROPERTIES]
    if windows:
        laws += [law.__name__ for law in kernels.OF_WINDOWS]
    return Plan(
        op,
        shared.choice(laws),
        which,
        str(shared.choice(contract.dtypes)).removeprefix("torch."),
        sizes,
        draw.choice(sorted(CONTENTS)),
        draw.randrange(2**16),
        tuple(a.name for a in case.inputs if a.optional and shared.random() < 0.3),
        bool(case.masks) and shared.random() < 0.5,
    )


def assert_op_invariant(op: str, *, cases: int = 200, device: str = "cpu") -> None:
    """Hold an op to all laws: ours by its name, one of your own as ``namespace::name``.

    Sizes cross the bounds of vectors, tiles and blocks, contents cancel, tie and are subnormal; the
    cases are the first of those that ``bicompile soak --only NAME`` goes on with.

    Args:
        op: its name.
        cases: how many are tried.
        device: where its tensors are.

    Raises:
        InvarianceViolation: a row's bits follow something else; with the line that reproduces it.
        UnknownSubject: the op is not registered, see `bicompile.register_op`.

    Example:
        >>> assert_op_invariant("rms_norm", cases=5)
    """
    from bicompile import registry

    registry.load_all()
    contract = registry.find(op).contract
    for number in range(cases):
        case = plan(op, contract, number)
        try:
            case.check(device)
        except InvarianceViolation as violation:
            raise InvarianceViolation(f"{case.law}: {violation}\n{case.call(device)}") from None
