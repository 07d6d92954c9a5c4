"""Putting a function under one of the systems that race."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bicompile
from bicompile.bench.cases import System

Function = Callable[..., Any]


def under(system: System, function: Function, owner: Any = None) -> Function:
    """A function under a system; `owner` is the module whose forward it is, if it is one."""
    if system.how == "inductor":
        return torch.compile(function, mode=system.mode, dynamic=system.dynamic)
    if system.how == "bicompile":
        how: dict[str, Any] = {"mode": system.mode, "dynamic": system.dynamic}
        if owner is None:
            return bicompile.compile(function, **how)
        forward: Function = bicompile.compile(owner, **how).forward
        return forward
    if system.how == "eager":
        return function
    backend = getattr(SDPBackend, system.how)

    def call(*args: Any) -> Any:
        with sdpa_kernel(backend):
            return function(*args)

    return call


def copy(function: types.FunctionType, name: str) -> Function:
    """Give a function a code object of its own: what Dynamo learns of sizes, it keeps by code."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def dtype_named(name: str) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextlib.contextmanager
def made_on(device: str) -> Any:
    """Tensors are made on this device, from the same random numbers each time."""
    torch.manual_seed(0)
    with torch.device(device):
        yield
