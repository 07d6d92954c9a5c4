"""The registry of kernels: one `Kernel` per op of the ``bicompile`` namespace.

Registering a kernel defines its torch.library op, its fake implementation and, on first use, its
CUDA implementation (function of the same name in the family's ``gpu.py``), which runs on the
certified schedules; the overload ``single`` is the same on one schedule.  The CPU implementation
comes from the family's ``cpu.cpp`` through `bicompile.native`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from bicompile.certificate import one_schedule
from bicompile.contract import Case, Contract
from bicompile.errors import RegistrationError, UnknownSubject

_LIBRARY = torch.library.Library("bicompile", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


@dataclass(frozen=True)
class Kernel:
    """An op whose order of summation is pinned.

    Args:
        name: name of the op: ``torch.ops.bicompile.<name>``.
        schema: its arguments and results in PyTorch's schema language.
        contract: the axes and dtypes.
        reference: the obvious implementation; called with float64 tensors it gives the true value.
        eager: PyTorch's own op with the same arguments, which accuracy and speed are held against.
        order: how the terms of one output element are combined, in one line.
        fake: shapes of the result; derived from the contract where every case has the same rank.
        target: the op itself, where it is not one of ours (`register_op`).
    """

    name: str
    schema: str
    contract: Contract
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    order: str
    fake: Callable[..., Any] | None = None
    target: torch._ops.OpOverload | None = None

    @property
    def family(self) -> str:
        """The folder below ``kernels/`` that holds this kernel."""
        return self.reference.__module__.split(".")[2]

    @property
    def op(self) -> torch._ops.OpOverload:
        """The op as it stands in a graph."""
        if self.target is not None:
            return self.target
        overload: torch._ops.OpOverload = getattr(torch.ops.bicompile, self.name).default
        return overload

    @property
    def single(self) -> torch._ops.OpOverload:
        """The same op on one GPU schedule for all sizes; of GPU tensors only."""
        overload: torch._ops.OpOverload = getattr(torch.ops.bicompile, self.name).single
        return overload


_KERNELS: dict[str, Kernel] = {}
KERNELS: Mapping[str, Kernel] = MappingProxyType(_KERNELS)
_OTHERS: dict[torch._ops.OpOverload, Kernel] = {}
OTHERS: Mapping[torch._ops.OpOverload, Kernel] = MappingProxyType(_OTHERS)
"""Ops of other packages that were registered with a contract."""
_OPS: dict[str, Kernel] = {}
OPS: Mapping[str, Kernel] = MappingProxyType(_OPS)
"""Name of an op of ours -> the kernel that it is, or is a part of."""


def register(kernel: Kernel) -> Kernel:
    """Define the op of a kernel and make the kernel known to rules, tests, docs and bench.

    Raises:
        RegistrationError: the name is taken, or the family was imported as ``kernels.<family>``.
    """
    if kernel.name in _KERNELS:
        raise RegistrationError(name=kernel.name, reason="the name is taken")
    if not kernel.reference.__module__.startswith("bicompile.kernels."):
        reason = f"import it as bicompile.{kernel.reference.__module__}"
        raise RegistrationError(name=kernel.name, reason=reason)
    fake = kernel.fake or _derived_fake(kernel.contract.cases[0])
    define_part(kernel, kernel.name, kernel.schema, fake)
    _KERNELS[kernel.name] = kernel
    return kernel


def register_op(
    op: torch._ops.OpOverload | torch._ops.OpOverloadPacket,
    contract: Contract | str,
    *,
    order: str,
    reference: Callable[..., Any] | None = None,
) -> Kernel:
    """State what an op of your own promises, so that graphs may hold it and its laws are tested.

    The backend believes the contract: rows of every ROW axis are independent, in bits, of all else.
    `bicompile.testing.assert_op_invariant` and ``bicompile soak --load MODULE`` hold the op to it.

    Args:
        op: as in ``torch.ops.mine.scale``; of `torch.library`, with a fake implementation.
        contract: of its tensors, by the names of its schema; a signature is a contract of one case
            in float32, bfloat16 and float16.
        order: how the terms of one output element are combined, in one line.
        reference: the obvious implementation, for float64 tensors; the op itself, if there is none.

    Raises:
        RegistrationError: the op is registered, or the contract does not fit its schema.

    Example:
        >>> @torch.library.custom_op("doctest::twice", mutates_args=())
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return x * 2
        >>> register_op(torch.ops.doctest.twice, "x: M K -> M K", order="no sum").name
        'doctest::twice'
    """
    target = op.default if isinstance(op, torch._ops.OpOverloadPacket) else op
    name = target._schema.name
    if target in _OTHERS or target.namespace == "bicompile":
        raise RegistrationError(name=name, reason="it is registered")
    if isinstance(contract, str):
        contract = Contract((Case(contract),))
    for case in contract.cases:
        _check_arguments(target, case)
    own = reference or target
    kernel = Kernel(name, str(target._schema), contract, own, target, order, target=target)
    _OTHERS[target] = kernel
    return kernel


def _check_arguments(op: torch._ops.OpOverload, case: Case) -> None:
    known = {a.name: a for a in op._schema.arguments}
    given = {arg.name for arg in case.inputs} | set(case.params)
    for name in sorted(given - set(known)):
        reason = f"its contract names {name!r}, its schema has {', '.join(known)}"
        raise RegistrationError(name=op._schema.name, reason=reason)
    for name, argument in known.items():
        if name not in given and not argument.has_default_value():
            reason = f"its contract says nothing of the argument {name!r}"
            raise RegistrationError(name=op._schema.name, reason=reason)


def find(name: str) -> Kernel:
    """The kernel of an op, ours by its name or another's as ``namespace::name``.

    Raises:
        UnknownSubject: there is none.
    """
    named = {**KERNELS, **{kernel.name: kernel for kernel in OTHERS.values()}}
    if name not in named:
        raise UnknownSubject(name=name, accepted=sorted(named))
    return named[name]


def define_part(kernel: Kernel, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define ``bicompile::<name>``; on CUDA it is the function of that name in the ``gpu.py``.

    For the kernel itself, and for the parts into which a pass opens it on a GPU: those promise what
    the kernel does, and have no contract of their own.
    """
    for overload, schedules in ((name, nullcontext), (f"{name}.single", one_schedule)):
        _LIBRARY.define(overload + schema, tags=_TAGS)
        torch.library.register_fake(f"bicompile::{overload}", fake, lib=_LIBRARY)
        _LIBRARY.impl(overload, _cuda_implementation(name, kernel.family, schedules), "CUDA")
    _OPS[name] = kernel


def _cuda_implementation(
    name: str, family: str, schedules: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """Import the family's Triton code when the first CUDA tensor arrives."""
    launch: Callable[..., Any] | None = None

    def implementation(*args: Any, **kwargs: Any) -> Any:
        nonlocal launch
        if launch is None:
            module = importlib.import_module(f"bicompile.kernels.{family}.gpu")
            launch = getattr(module, name)
        with schedules(), torch.cuda.device_of(args[0]):
            return launch(*args, **kwargs)

    return implementation


def _derived_fake(case: Case) -> Callable[..., Any]:
    def fake(*args: Any, **_: Any) -> Any:
        size = {
            axis: tensor.shape[i]
            for arg, tensor in zip(case.inputs, args, strict=False)
            for i, axis in enumerate(arg.axes)
        }
        outputs = tuple(args[0].new_empty([size[a] for a in out]) for out in case.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    return fake


def load_all() -> Mapping[str, Kernel]:
    """Import every family below ``kernels/`` and return all kernels by name."""
    package = importlib.import_module("bicompile.kernels")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        importlib.import_module(f"bicompile.kernels.{module.name}")
    return KERNELS
