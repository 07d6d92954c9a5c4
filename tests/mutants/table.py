"""All faults."""

from __future__ import annotations

from collections.abc import Mapping

from . import in_attention, in_fusions, in_rules, in_sums, in_triton
from .mutant import Mutant

PARTS: Mapping[str, tuple[Mutant, ...]] = {
    "C++ kernels of sums": in_sums.MUTANTS,
    "Other C++ kernels": in_attention.MUTANTS,
    "Triton kernels, in the interpreter": in_triton.MUTANTS,
    "The audit and the rules": in_rules.MUTANTS,
    "Fusions": in_fusions.MUTANTS,
}
MUTANTS: tuple[Mutant, ...] = tuple(m for part in PARTS.values() for m in part)
