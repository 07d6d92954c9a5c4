"""Which schedules may serve a call of one of our ops, and which one does for the sizes at hand.

On a GPU the tables are those of the families (``kernels/<family>/schedules.py``); the launcher
looks the rows up at run time, so a symbolic size is shown by its example, and operands are taken to
be aligned.  On the CPU the C++ kernels choose by the same few numbers that stand here; a test holds
them against the source.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from bicompile import certificate
from bicompile.graph import hint, value
from bicompile.kernels.attention import schedules as attention_schedules
from bicompile.kernels.attention import table as attention_table
from bicompile.kernels.matmul import table as matmul_table
from bicompile.kernels.matmul.schedules import kind_of
from bicompile.kernels.rope import schedules as rope_table
from bicompile.registry import OPS

BLOCK = 4096
"""Largest block of a row kernel on a GPU (kernels/common/trees.py)."""

Arguments = Mapping[str, Any]
"""The arguments of an op by name, in order."""

FEW_ROWS = 64
"""Below so many rows the CPU's matmul walks a transposed factor row by row (rows.h)."""

FEW_COLUMN_ROWS = {True: 8, False: 24}
"""The same for a factor that lies by columns (columns.h); by whether it is bfloat16."""


@dataclass(frozen=True)
class Choice:
    """The schedules of one bit class that may serve a call, and the one that does."""

    chosen: str
    allowed: tuple[str, ...]


def choose(node: Node) -> Choice | None:
    """The schedules of a call of ours; None for any other node."""
    if getattr(node.target, "namespace", "") != "bicompile":
        return None
    schema = node.target._schema  # type: ignore[union-attr]
    name = schema.name.split("::")[1]
    device = value(node.args[0]).device.type
    function = _FUNCTIONS.get((OPS[name].family, device)) if name != "visible_range" else None
    named = zip((a.name for a in schema.arguments), map(value, node.args), strict=False)
    return function(name, dict(named)) if function else _ONE


_ONE = Choice("one loop over the rows", ("one loop over the rows",))


def _text(schedule: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(schedule).items())


def _choice(chosen: Any, allowed: Sequence[Any]) -> Choice:
    return Choice(_text(chosen), tuple(dict.fromkeys(map(_text, (chosen, *allowed)))))


def _factors(name: str, args: Arguments) -> tuple[torch.Tensor, torch.Tensor, bool]:
    first = 1 if name in ("addmm", "baddbmm") else 0
    left, right, *_ = [*args.values()][first:]
    return left, right, bool([*args.values()][-1])


def _matmul_cpu(name: str, args: Arguments) -> Choice:
    left, right, _ = _factors(name, args)
    rows = hint(left.shape[-2])
    along_k = hint(right.shape[-2]) <= 1 or hint(right.stride(-2)) == 1
    allowed = ("rows" if along_k else "columns", "panels")
    limit = FEW_ROWS if along_k else FEW_COLUMN_ROWS[left.dtype is torch.bfloat16]
    return Choice(allowed[rows >= limit], allowed)


def _served(family: str, bit_class: str, wanted: Any, single: Any) -> Any:
    """What the launcher takes here; without a GPU, what the table says."""
    if not torch.cuda.is_available():
        return wanted
    return certificate.choose(family, bit_class, wanted, single, lambda: (wanted,))


def _capability() -> str:
    """Of this machine's GPU; without one, of the newest that the tables know."""
    here = torch.cuda.is_available()
    return ".".join(map(str, torch.cuda.get_device_capability())) if here else "9.0"


def _processors() -> int:
    """Of this machine's GPU; without one, of an H200."""
    here = torch.cuda.is_available()
    return torch.cuda.get_device_properties("cuda").multi_processor_count if here else 132


def _matmul_cuda(name: str, args: Arguments) -> Choice:
    left, right, tf32 = _factors(name, args)
    kind = kind_of(left.dtype, tf32, _capability())
    kind += " pair" if name == "swiglu" else ""
    *_, rows, terms = (hint(n) for n in left.shape)
    weights = [*args.values()][1:4] if name == "qkv_proj" else [right]
    columns = [hint(w.shape[-1]) for w in weights]
    blocks = left.dim() == 2 and not any(n % 8 for n in (*columns, terms))
    least = min(columns) if blocks and len(columns) > 1 else 0
    size = kind, _capability(), _processors(), rows, sum(columns), terms, blocks, 0, least
    here = torch.cuda.is_available()
    chosen = matmul_table.schedule(*size) if here else matmul_table.ranked(*size)[-1]
    return _choice(chosen, matmul_table.schedules(kind, _capability()))


def _attention_cuda(name: str, args: Arguments) -> Choice:
    query, key, val = [*args.values()][:3]
    head = max(16, *(1 << (hint(t.shape[3]) - 1).bit_length() for t in (query, val)))
    rows = hint(query.shape[2]) * (hint(query.shape[1]) // hint(key.shape[1]))
    at = attention_schedules.key(query.element_size(), head)
    single = attention_schedules.SINGLE[at]
    wanted = attention_table.wanted(at, rows, _capability())
    chosen = _served("attention", attention_schedules.bit_class(*at), wanted, single)
    return _choice(chosen, attention_table.schedules(at, _capability()))


def _rope_cuda(name: str, args: Arguments) -> Choice:
    first = next(iter(args.values()))
    tokens = hint(first.shape[0]) * hint(first.shape[1])
    chosen = _served("rope", "heads", rope_table.wanted(tokens), rope_table.SINGLE)
    return _choice(chosen, rope_table.TABLE)


def _rows_cuda(family: str, name: str, args: Arguments) -> Choice:
    from bicompile.kernels.reduce import table as rows_table  # needs Triton

    sizes = [hint(s) for s in next(iter(args.values())).shape]
    total, k = math.prod(sizes), _reduced(sizes, args)
    rows = total // k if k else 0
    entry = rows_table.entry(k, min(1 << (max(k, 1) - 1).bit_length(), BLOCK))
    crowded = name in ("layer_norm", "group_norm", "layer_norm_backward", "group_norm_backward")
    held = name in ("softmax", "rms_norm", "layer_norm", "group_norm")
    cut = family != "norm"
    wanted = rows_table.wanted(family, rows, k, entry, crowded, held, cut)
    chosen = _served(family, entry.name, wanted, entry.single)
    return _choice(chosen, entry.schedules(cut))


def _reduced(sizes: Sequence[int], args: Arguments) -> int:
    """How many terms one output has."""
    if "normalized_ndim" in args:
        return math.prod(sizes[len(sizes) - args["normalized_ndim"] :])
    if "groups" in args:
        return math.prod(sizes[1:]) // hint(args["groups"])
    dims = [args["dim"]] if isinstance(args["dim"], int) else args["dim"]
    return math.prod(sizes[d] for d in dims) if sizes else 1


_FUNCTIONS: Mapping[tuple[str, str], Callable[[str, Arguments], Choice]] = {
    ("matmul", "cpu"): _matmul_cpu,
    ("matmul", "cuda"): _matmul_cuda,
    ("attention", "cuda"): _attention_cuda,
    ("rope", "cuda"): _rope_cuda,
    **{
        (family, "cuda"): functools.partial(_rows_cuda, family)
        for family in ("reduce", "softmax", "norm")
    },
}
