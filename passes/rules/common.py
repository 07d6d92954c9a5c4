"""What the binding functions of several families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem, mul
from typing import Any

import torch
from torch.fx import Node

from bicompile.graph import value
from bicompile.registry import Kernel, load_all

KERNELS = load_all()
aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Rule:
    """`target` becomes `kernel`, with arguments arranged by `bind`.

    A target of another package is given by its name.  `integers`: also where the result holds no
    floating-point numbers.
    """

    target: torch._ops.OpOverload | str
    kernel: Kernel
    bind: Callable[..., Any]
    integers: bool = False


def size(emit, x, dim, known):
    """A size as an argument of a view: the number, or the node that computes it."""
    return known if isinstance(known, int) else emit(aten.sym_size.int, x, dim)


def product(emit, sizes):
    """Of sizes, numbers and nodes."""
    known = all(isinstance(n, int) for n in sizes)
    return math.prod(sizes) if known else reduce(lambda a, b: emit(mul, a, b), sizes)


def as_dtype(emit, x, dtype):
    """x in a dtype."""
    return x if value(x).dtype is dtype else emit(prims.convert_element_type.default, x, dtype)


def fill(emit, x, mask, number):
    """x with a number where the mask is True."""
    like = value(x)
    number = emit(aten.scalar_tensor.default, number, dtype=like.dtype, device=like.device)
    return emit(aten.where.self, mask, number, x)


def rows_of_zeros(emit, count, width, like):
    """[count, width] of 0 for an op of ours, which reads any strides: one row is in memory."""
    like = {"dtype": like.dtype, "device": like.device}
    row = emit(aten.full.default, [width], 0.0, **like)
    return emit(aten.expand.default, row, [count, width])


def dims(x: Node, dim: Any) -> list[int]:
    """The reduced axes, counted from the front and in order; None and () mean all."""
    rank = value(x).dim()
    if dim is None or (isinstance(dim, Sequence) and len(dim) == 0):
        return list(range(rank))
    given = [dim] if isinstance(dim, int) else dim
    return sorted(d % rank for d in given) if rank else []


def cast(emit, x, dtype):
    """PyTorch casts to `dtype` before it reduces; a wider output needs no copy of the input."""
    dtype = dtype or value(x).dtype
    widens = value(x).dtype in (torch.bfloat16, torch.float16) and dtype is torch.float32
    if value(x).dtype is not dtype and not widens:
        x = emit(prims.convert_element_type.default, x, dtype)
    return x, dtype


def outputs(emit, call, count):
    """The first `count` results of a call."""
    return tuple(emit(getitem, call, i) for i in range(count))


def same_dtype(emit, x, *weights):
    """Mixed dtypes are computed in fp32, as PyTorch does, and rounded to x's dtype at the end."""
    if all(w is None or value(w).dtype is value(x).dtype for w in weights):
        return x, *weights
    convert = prims.convert_element_type.default
    return tuple(
        t if t is None or value(t).dtype is torch.float32 else emit(convert, t, torch.float32)
        for t in (x, *weights)
    )
