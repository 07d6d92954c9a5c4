"""RULES: aten overload -> our op, one entry per overload, in one table.

An entry is `(overload, name of our op, bind)` in the file of its family, and True behind them if
the rule is for integers, too.  `bind` has the aten op's own signature behind `emit` (see
`bicompile.graph.Emit`); it emits the calls that take the node's place and returns the last one, or
a tuple for several outputs (None for an output that may not be used).  It returns `NotImplemented`
where the rule does not apply; the audit then says what becomes of the node.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bicompile.passes.rules import (
    batch_norm,
    convolution,
    gradients,
    matmul,
    norm,
    reduce,
    scan,
    scatter,
    solve,
    sort,
)
from bicompile.passes.rules.batch_norm import OVER_THE_BATCH, over_the_batch
from bicompile.passes.rules.common import KERNELS, Rule

__all__ = ["OVER_THE_BATCH", "RULES", "Rule", "over_the_batch", "rule_of"]

_FAMILIES = (matmul, convolution, reduce, norm, batch_norm, scan, sort, scatter, solve, gradients)

RULES: Mapping[torch._ops.OpOverload | str, Rule] = {
    overload: Rule(overload, KERNELS[name], bind, *integers)
    for family in _FAMILIES
    for overload, name, bind, *integers in family.RULES
}


def rule_of(target: object) -> Rule | None:
    """The rule for what a node calls."""
    return RULES.get(target) or RULES.get(str(target))
