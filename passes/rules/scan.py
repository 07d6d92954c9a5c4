"""Running sums, products and logarithms of sums of exponentials."""

from __future__ import annotations

from bicompile.graph import value
from bicompile.passes.rules.common import KERNELS, aten, cast


def _scan(name):
    def bind(emit, self, dim, *, dtype=None):
        self, dtype = cast(emit, self, dtype)
        return emit(KERNELS[name].op, self, dim % max(value(self).dim(), 1), dtype)

    return bind


RULES = (
    (aten.cumsum.default, "cumsum", _scan("cumsum")),
    (aten.cumprod.default, "cumprod", _scan("cumprod")),
    (aten.logcumsumexp.default, "logcumsumexp", _scan("logcumsumexp")),
)
