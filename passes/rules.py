"""RULES: aten overload -> our op, one entry per overload, in one table.

An entry's function has the aten op's own signature behind `emit` (see `bicompile.graph.Emit`); it
emits the calls that take the node's place and returns the last one, or a tuple for several outputs
(None for an output that may not be used).  It returns `NotImplemented` where the rule does not
apply; the audit then says what becomes of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from bicompile.errors import BatchStatistics
from bicompile.graph import describe_call, user_line, value
from bicompile.registry import Kernel, load_all

KERNELS = load_all()
aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Rule:
    """`target` becomes `kernel`, with arguments arranged by `bind`."""

    target: torch._ops.OpOverload
    kernel: Kernel
    bind: Callable[..., Any]


# --------------------------------------------------------------------------------------- matmul


def tf32(x: Node) -> bool:
    """Whether fp32 products may be rounded to tf32 first: only if the user said so, on a GPU."""
    val = value(x)
    lowered = torch.get_float32_matmul_precision() != "highest"
    return val.device.type == "cuda" and val.dtype is torch.float32 and lowered


def _mm(emit, self, mat2):
    return emit(KERNELS["mm"].op, self, mat2, tf32(self))


def _bmm(emit, self, mat2):
    return emit(KERNELS["bmm"].op, self, mat2, tf32(self))


def _addmm(emit, self, mat1, mat2, *, beta=1, alpha=1):
    return emit(KERNELS["addmm"].op, self, mat1, mat2, float(beta), float(alpha), tf32(mat1))


def _baddbmm(emit, self, batch1, batch2, *, beta=1, alpha=1):
    op = KERNELS["baddbmm"].op
    return emit(op, self, batch1, batch2, float(beta), float(alpha), tf32(batch1))


def _mv(emit, self, vec):
    return emit(aten.squeeze.dim, _mm(emit, self, emit(aten.unsqueeze.default, vec, 1)), 1)


def _dot(emit, self, tensor):
    row = emit(aten.unsqueeze.default, self, 0)
    return emit(aten.squeeze.dim, _mv(emit, row, tensor), 0)


def _addmv(emit, self, mat, vec, *, beta=1, alpha=1):
    if value(self).dim() == 1:
        self = emit(aten.unsqueeze.default, self, 1)
    column = emit(aten.unsqueeze.default, vec, 1)
    return emit(aten.squeeze.dim, _addmm(emit, self, mat, column, beta=beta, alpha=alpha), 1)


def _addbmm(emit, self, batch1, batch2, *, beta=1, alpha=1):
    """The sum over the batch is part of K: element (b, k) of the chain comes at b * K + k."""
    _, m, _ = value(batch1).shape
    _, _, n = value(batch2).shape
    rows = emit(aten.permute.default, batch1, [1, 0, 2])
    rows = emit(aten.reshape.default, rows, [_size(emit, rows, 0, m), -1])
    columns = emit(aten.reshape.default, batch2, [-1, _size(emit, batch2, 2, n)])
    return _addmm(emit, self, rows, columns, beta=beta, alpha=alpha)


def _size(emit, x, dim, size):
    """A size as an argument of a view: the number, or the node that computes it."""
    return size if isinstance(size, int) else emit(aten.sym_size.int, x, dim)


# --------------------------------------------------------------------------------------- reduce


def _dims(x: Node, dim: Any) -> list[int]:
    rank = value(x).dim()
    if dim is None or (isinstance(dim, Sequence) and len(dim) == 0):
        return list(range(rank))
    given = [dim] if isinstance(dim, int) else dim
    return sorted(d % rank for d in given) if rank else []


def _cast(emit, x, dtype):
    """PyTorch casts to `dtype` before it reduces; a wider output needs no copy of the input."""
    dtype = dtype or value(x).dtype
    widens = value(x).dtype in (torch.bfloat16, torch.float16) and dtype is torch.float32
    if value(x).dtype is not dtype and not widens:
        x = emit(prims.convert_element_type.default, x, dtype)
    return x, dtype


def _reduction(name):
    def bind(emit, self, dim=None, keepdim=False, *, dtype=None):
        self, dtype = _cast(emit, self, dtype)
        return emit(KERNELS[name].op, self, _dims(self, dim), keepdim, dtype)

    return bind


def _variance(name):
    def bind(emit, self, dim=None, *, correction=None, keepdim=False):
        correction = 1.0 if correction is None else float(correction)
        return emit(KERNELS[name].op, self, _dims(self, dim), correction, keepdim)

    return bind


def _var_mean(emit, self, dim=None, *, correction=None, keepdim=False):
    both = _variance("var_mean")(emit, self, dim, correction=correction, keepdim=keepdim)
    return _outputs(emit, both, 2)


def _logsumexp(emit, self, dim, keepdim=False):
    return emit(KERNELS["logsumexp"].op, self, _dims(self, dim), keepdim)


def _vector_norm(emit, self, ord=2, dim=None, keepdim=False, *, dtype=None):
    self, dtype = _cast(emit, self, dtype)
    return emit(KERNELS["norm"].op, self, float(ord), _dims(self, dim), keepdim, dtype)


def _norm(emit, self, p=2, dim=None, keepdim=False, *, dtype=None):
    return _vector_norm(emit, self, 2 if p is None else p, dim, keepdim, dtype=dtype)


# ---------------------------------------------------------------------------- softmax and norms


def _softmax(name):
    def bind(emit, self, dim, half_to_float):
        dtype = torch.float32 if half_to_float else value(self).dtype
        return emit(KERNELS[name].op, self, dim % max(value(self).dim(), 1), dtype)

    return bind


def _outputs(emit, call, count):
    from operator import getitem

    return tuple(emit(getitem, call, i) for i in range(count))


def _as_original(emit, outputs):
    """Statistics in the dtype that PyTorch gives them on this device."""
    wanted = value(emit.node)
    return tuple(
        out
        if value(out).dtype is like.dtype
        else emit(prims.convert_element_type.default, out, like.dtype)
        for out, like in zip(outputs, wanted, strict=False)
    )


def _same_dtype(emit, x, *weights):
    """Mixed dtypes are computed in fp32, as PyTorch does, and rounded to x's dtype at the end."""
    if all(w is None or value(w).dtype is value(x).dtype for w in weights):
        return x, *weights
    convert = prims.convert_element_type.default
    return tuple(
        t if t is None or value(t).dtype is torch.float32 else emit(convert, t, torch.float32)
        for t in (x, *weights)
    )


def _layer_norm(emit, input, normalized_shape, weight, bias, eps):
    input, weight, bias = _same_dtype(emit, input, weight, bias)
    call = emit(KERNELS["layer_norm"].op, input, len(normalized_shape), weight, bias, float(eps))
    return _as_original(emit, _outputs(emit, call, 3))


def _group_norm(emit, input, weight, bias, N, C, HxW, group, eps):
    input, weight, bias = _same_dtype(emit, input, weight, bias)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, group, float(eps))
    return _as_original(emit, _outputs(emit, call, 3))


def _fused_rms_norm(emit, input, normalized_shape, weight, eps):
    eps = torch.finfo(value(input).dtype).eps if eps is None else float(eps)
    if weight is not None and value(weight).dtype is not value(input).dtype:
        return NotImplemented
    op = KERNELS["rms_norm"].op
    return emit(op, input, len(normalized_shape), weight, eps, 0.0, False), None


def _batch_norm_without_stats(emit, input, weight, bias, training, momentum, eps):
    """One sample: each channel is a row of its own; more: the statistics are over the batch.

    InstanceNorm views N samples of C channels as one sample of N * C.
    """
    samples, channels = value(input).shape[:2]
    if not (isinstance(samples, int) and samples == 1):
        raise BatchStatistics(
            op=emit.node.target, given=describe_call(emit.node), line=user_line(emit.node)
        )
    input, weight, bias = _same_dtype(emit, input, weight, bias)
    groups = _size(emit, input, 1, channels)
    call = emit(KERNELS["group_norm"].op, input, weight, bias, groups, float(eps))
    out, mean, rstd = _outputs(emit, call, 3)
    flat = [emit(aten.reshape.default, t, [-1]) for t in (mean, rstd)]
    return _as_original(emit, (out, *flat))


def _batch_norm_in_training(emit, *args):
    raise BatchStatistics(
        op=emit.node.target, given=describe_call(emit.node), line=user_line(emit.node)
    )


OVER_THE_BATCH = (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
    aten.native_batch_norm.default,
)
"""Refused: their statistics are over the batch."""


def _table() -> Mapping[torch._ops.OpOverload, Rule]:
    entries: list[tuple[Any, str, Callable[..., Any]]] = [
        (aten.mm.default, "mm", _mm),
        (aten.bmm.default, "bmm", _bmm),
        (aten.addmm.default, "addmm", _addmm),
        (aten.baddbmm.default, "baddbmm", _baddbmm),
        (aten.mv.default, "mm", _mv),
        (aten.dot.default, "mm", _dot),
        (aten.vdot.default, "mm", _dot),
        (aten.addmv.default, "addmm", _addmv),
        (aten.addbmm.default, "addmm", _addbmm),
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
        (aten.norm.Scalar, "norm", _norm),
        (aten.norm.ScalarOpt_dim, "norm", _norm),
        (aten.norm.ScalarOpt_dim_dtype, "norm", _norm),
        (aten._softmax.default, "softmax", _softmax("softmax")),
        (aten._log_softmax.default, "log_softmax", _softmax("log_softmax")),
        (aten.native_layer_norm.default, "layer_norm", _layer_norm),
        (aten.native_group_norm.default, "group_norm", _group_norm),
        (aten._fused_rms_norm.default, "rms_norm", _fused_rms_norm),
        (aten._native_batch_norm_legit.no_stats, "group_norm", _batch_norm_without_stats),
        *((op, "group_norm", _batch_norm_in_training) for op in OVER_THE_BATCH),
    ]
    return {op: Rule(op, KERNELS[name], bind) for op, name, bind in entries}


RULES: Mapping[torch._ops.OpOverload, Rule] = _table()
