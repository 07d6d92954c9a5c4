"""Invariance as a property: search for the input that breaks it, compare bits, shrink, reproduce.

`assert_batch_invariant` tests any function, module or transformers model, on any backend::

    from bicompile.testing import assert_batch_invariant

    def make_inputs(batch_size):
        return {"input": torch.randn(batch_size, 4096, dtype=torch.bfloat16)}

    assert_batch_invariant(torch.nn.RMSNorm(4096).bfloat16(), make_inputs, backend="inductor")

`assert_op_invariant` tests one op against its contract.  Which properties there are stands in
`bicompile.testing.PROPERTIES` and in docs/testing.md; what ops are held to in
`bicompile.testing.kernels`.  The search needs Hypothesis, which the extra `testing` brings; nothing
else here does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bicompile.certificate import random_schedules
from bicompile.errors import PackageNotFound
from bicompile.testing.bits import (
    InvarianceViolation,
    assert_same_bits,
    bits,
    outputs,
    pattern,
    ulps,
)
from bicompile.testing.kernels import (
    LAYOUTS,
    Sample,
    bits_do_not_depend_on_layout,
    bits_do_not_depend_on_the_run,
    error_against_float64,
    make_sample,
    num_threads,
    rows_do_not_depend_on_neighbours,
    rows_do_not_depend_on_the_batch,
)

if TYPE_CHECKING:
    from bicompile.testing.plan import assert_op_invariant
    from bicompile.testing.properties import PROPERTIES
    from bicompile.testing.search import assert_batch_invariant

__all__ = [
    "LAYOUTS",
    "PROPERTIES",
    "InvarianceViolation",
    "Sample",
    "assert_batch_invariant",
    "assert_op_invariant",
    "assert_same_bits",
    "bits",
    "bits_do_not_depend_on_layout",
    "bits_do_not_depend_on_the_run",
    "error_against_float64",
    "make_sample",
    "num_threads",
    "outputs",
    "pattern",
    "random_schedules",
    "rows_do_not_depend_on_neighbours",
    "rows_do_not_depend_on_the_batch",
    "ulps",
]

_HOMES = {
    "PROPERTIES": "properties",
    "assert_batch_invariant": "search",
    "assert_op_invariant": "plan",
}


def __getattr__(name: str) -> Any:
    """Import what needs Hypothesis when it is first used."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'bicompile.testing' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"bicompile.testing.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise PackageNotFound(package="hypothesis", need=name, extra="testing") from None
