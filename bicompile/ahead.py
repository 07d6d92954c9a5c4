"""Triton kernels of a graph are built before its first call, in parallel, while Inductor works.

A kernel follows the number of rows (its schedule does), and a new number must not stall a request.
So every op of ours is launched with meta tensors of several sizes, which builds its kernel and runs
nothing (`bicompile.kernels.common.launch`).
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_map

from bicompile.certificate import one_schedule
from bicompile.graph import device_of, hint, subgraphs, value
from bicompile.inductor import outside_tracing
from bicompile.registry import OPS

#: What each size that may vary is set to: between two of them no schedule changes.
SIZES = (
    2, 4, 8, 16, 31, 32, 63, 64, 127, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096,
)  # fmt: skip


@contextmanager
def kernels_built(gm: GraphModule) -> Iterator[None]:
    """Build the kernels of the graph's ops on a GPU meanwhile; on leaving they are ready."""
    nodes = {_launched_as(node): node for node in _ops_on_gpu(gm)}.values()
    if not nodes:
        yield
        return
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        for node in nodes:
            with torch.cuda.device(device_of(node)):
                build(node)
        yield


def build(node: Node) -> None:
    """Launch an op with meta tensors: once if all sizes are known, else for each of SIZES.

    A product of matrices may find memory behind its rows (`kernels/common/room.py`), or none.
    """
    from bicompile.kernels.common.launch import building_for
    from bicompile.kernels.common.room import TILES

    schedules = one_schedule if node.target._overloadname == "single" else nullcontext  # type: ignore[union-attr]
    name = node.target.name().split("::")[1].split(".")[0]  # type: ignore[union-attr]
    launch = getattr(importlib.import_module(f"bicompile.kernels.{OPS[name].family}.gpu"), name)
    args = tree_map(value, node.args)
    is_product = OPS[name].family == "matmul"
    rooms = (0, TILES[-1]) if is_product else (0,)
    for sizes, room in itertools.product(_sizes(args, is_product), rooms):
        stand_in = functools.partial(_with_sizes, sizes, room)
        with schedules(), building_for(device_of(node)), outside_tracing():
            launch(*tree_map(stand_in, args))


def _ops_on_gpu(gm: GraphModule) -> Iterator[Node]:
    for module in subgraphs(gm):
        for node in module.graph.nodes:
            ours = getattr(node.target, "namespace", "") == "bicompile"
            if node.op == "call_function" and ours and device_of(node).type == "cuda":
                yield node


def _launched_as(node: Node) -> Hashable:
    """What the kernels of an op follow: alike in most layers of a model."""

    def number(n: Any) -> Any:
        return n.node.expr if isinstance(n, torch.SymInt) else n

    def describe(x: Any) -> Hashable:
        if not isinstance(x, torch.Tensor):
            return number(x) if isinstance(x, torch.SymInt) else repr(x)
        return (x.dtype, *map(number, x.shape), *map(number, x.stride()))

    leaves, structure = tree_flatten(tree_map(value, node.args))
    return node.target, device_of(node), repr(structure), *map(describe, leaves)


def _sizes(args: Any, is_product: bool) -> Iterator[dict[Any, int]]:
    """What symbols are set to: each of SIZES.

    Of a product of sizes (sequences by tokens) each is set to it, and one with the others at 1.
    Where the sizes of weights vary, too, they are also what the graph was traced with.
    """
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)]
    numbers = [x for x in tree_flatten(args)[0] if isinstance(x, torch.SymInt)]
    symbols = _symbols(itertools.chain(numbers, *(t.shape for t in tensors)))
    of_strides = _symbols(itertools.chain(*(t.stride() for t in tensors)))
    several = is_product and len(symbols) > 1
    for size in SIZES if symbols else SIZES[:1]:
        for others in (size, 1) if several else (size,):
            yield dict.fromkeys(of_strides + symbols, others) | dict.fromkeys(symbols[:1], size)
    of_weights = _symbols(t.shape[-1] for t in tensors if t.dim())
    if several and of_weights:
        rows = _symbols(itertools.chain(*(t.shape[:-1] for t in tensors)))
        rows = [s for s in rows if s not in of_weights]
        traced = _traced(itertools.chain(*((*t.shape, *t.stride()) for t in tensors)))
        for size in SIZES:
            yield dict.fromkeys(of_strides + symbols, size) | traced | dict.fromkeys(rows, size)


def _symbols(numbers: Iterable[Any]) -> list[Any]:
    """What numbers depend on, in the order of their names."""
    found = (n.node.expr.free_symbols for n in numbers if isinstance(n, torch.SymInt))
    return sorted(set().union(*found), key=str)


def _traced(numbers: Iterable[Any]) -> dict[Any, int]:
    """What symbols were in the example that the graph was traced with."""
    found = (n for n in numbers if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol)
    return {n.node.expr: hint(n) for n in found}


def _with_sizes(sizes: Mapping[Any, int], room: int, x: Any) -> Any:
    """A tensor (on meta), with so many rows of memory behind it, or a number: sizes for symbols."""

    def number(n: Any) -> Any:
        return int(n.node.expr.xreplace(sizes)) if isinstance(n, torch.SymInt) else n

    if isinstance(x, torch.Tensor):
        shape, strides = ([number(n) for n in ns] for ns in (x.shape, x.stride()))
        used = 1 + sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
        memory = torch.empty(used + room * max(strides, default=0), dtype=x.dtype, device="meta")
        return memory.as_strided(shape, strides)
    return number(x)
