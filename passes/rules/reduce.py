"""Sums and what is made of them."""

from __future__ import annotations

import torch

from bicompile.graph import value
from bicompile.passes.audit import is_pointwise
from bicompile.passes.rules.common import KERNELS, aten, cast, dims, outputs, product, size


def _reduction(name):
    def bind(emit, self, dim=None, keepdim=False, *, dtype=None):
        self, dtype = cast(emit, self, dtype)
        axes = dims(self, dim)
        rank = value(self).dim()
        kept = [d for d in range(rank) if d not in axes]
        if not _is_written_for_this(self, axes, kept):
            return emit(KERNELS[name].op, self, axes, keepdim, dtype)
        out = emit(KERNELS[name].op, _as_rows(emit, self, axes, kept), [len(kept)], False, dtype)
        for d in axes if keepdim else ():
            out = emit(aten.unsqueeze.default, out, d)
        return out

    return bind


def _is_written_for_this(x, axes, kept) -> bool:
    """Whether Inductor writes x, and the terms of a sum would lie apart.

    The kernels of a GPU read terms that lie side by side, and copy others first.
    """
    apart = bool(axes) and bool(kept) and axes[0] < kept[-1]
    return apart and value(x).device.type == "cuda" and is_pointwise(x)


def _as_rows(emit, x, axes, kept):
    """x with the terms of each sum side by side, written so by whatever makes it."""
    rows = emit(aten.permute.default, x, [*kept, *axes])
    rows = emit(aten.clone.default, rows, memory_format=torch.contiguous_format)
    sizes = [size(emit, x, d, n) for d, n in enumerate(value(x).shape)]
    shape = [*(sizes[d] for d in kept), product(emit, [sizes[d] for d in axes])]
    return emit(aten.view.default, rows, shape)  # a view keeps Inductor to this layout


def _variance(name):
    def bind(emit, self, dim=None, *, correction=None, keepdim=False):
        correction = 1.0 if correction is None else float(correction)
        return emit(KERNELS[name].op, self, dims(self, dim), correction, keepdim)

    return bind


def _var_mean(emit, self, dim=None, *, correction=None, keepdim=False):
    both = _variance("var_mean")(emit, self, dim, correction=correction, keepdim=keepdim)
    return outputs(emit, both, 2)


def _logsumexp(emit, self, dim, keepdim=False):
    return emit(KERNELS["logsumexp"].op, self, dims(self, dim), keepdim)


def _vector_norm(emit, self, ord=2, dim=None, keepdim=False, *, dtype=None):
    self, dtype = cast(emit, self, dtype)
    return emit(KERNELS["norm"].op, self, float(ord), dims(self, dim), keepdim, dtype)


def _norm(emit, self, p=2, dim=None, keepdim=False, *, dtype=None):
    return _vector_norm(emit, self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def _norms(emit, self, ord=2, dtype=None):
    return tuple(_vector_norm(emit, x, ord, dtype=dtype) for x in self)


RULES = (
    (aten.sum.default, "sum", _reduction("sum")),
    (aten.sum.dim_IntList, "sum", _reduction("sum")),
    (aten.mean.default, "mean", _reduction("mean")),
    (aten.mean.dim, "mean", _reduction("mean")),
    (aten.prod.default, "prod", _reduction("prod")),
    (aten.prod.dim_int, "prod", _reduction("prod")),
    (aten.var.correction, "var", _variance("var")),
    (aten.std.correction, "std", _variance("std")),
    (aten.var_mean.correction, "var_mean", _var_mean),
    (aten.logsumexp.default, "logsumexp", _logsumexp),
    (aten.linalg_vector_norm.default, "norm", _vector_norm),
    (aten._foreach_norm.Scalar, "norm", _norms),
    (aten.norm.Scalar, "norm", _norm),
    (aten.norm.ScalarOpt_dim, "norm", _norm),
    (aten.norm.ScalarOpt_dim_dtype, "norm", _norm),
)
