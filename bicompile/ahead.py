"""Triton kernels of a graph are built before its first call, in parallel, while Inductor works.

A kernel follows the number of rows (its schedule does), and a new number must not stall a request.
So every op of ours is launched with meta tensors of several sizes, which builds its kernel and runs
nothing (`bicompile.kernels.common.launch`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from bicompile.certificate import one_schedule
from bicompile.graph import device_of, subgraphs, value
from bicompile.inductor import outside_tracing
from bicompile.registry import OPS

#: What each size that may vary is set to: bounds of schedules are powers of two.
SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@contextmanager
def kernels_built(gm: GraphModule) -> Iterator[None]:
    """Build the kernels of the graph's ops on a GPU meanwhile; on leaving they are ready."""
    nodes = list(_ops_on_gpu(gm))
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
    """Launch an op with meta tensors: once if all sizes are known, else for each of SIZES."""
    from bicompile.kernels.common.launch import building_for

    schedules = one_schedule if node.target._overloadname == "single" else nullcontext  # type: ignore[union-attr]
    name = node.target.name().split("::")[1].split(".")[0]  # type: ignore[union-attr]
    launch = getattr(importlib.import_module(f"bicompile.kernels.{OPS[name].family}.gpu"), name)
    args = tree_map(value, node.args)
    for size in SIZES if _varies(args) else SIZES[:1]:
        with schedules(), building_for(device_of(node)), outside_tracing():
            launch(*tree_map(lambda x, size=size: _with_size(x, size), args))


def _ops_on_gpu(gm: GraphModule) -> Iterator[Node]:
    for module in subgraphs(gm):
        for node in module.graph.nodes:
            ours = getattr(node.target, "namespace", "") == "bicompile"
            if node.op == "call_function" and ours and device_of(node).type == "cuda":
                yield node


def _varies(args: Any) -> bool:
    found = False

    def look(x: Any) -> None:
        nonlocal found
        if isinstance(x, torch.Tensor):
            found |= any(isinstance(n, torch.SymInt) for n in x.shape)

    tree_map(look, args)
    return found


def _with_size(x: Any, size: int) -> Any:
    """A tensor (on meta) or a number in which every size that may vary is `size`."""

    def number(n: Any) -> Any:
        if not isinstance(n, torch.SymInt):
            return n
        expression = n.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, size)))

    if isinstance(x, torch.Tensor):
        shape, strides = ([number(n) for n in ns] for ns in (x.shape, x.stride()))
        return torch.empty_strided(shape, strides, dtype=x.dtype, device="meta")
    return number(x)
