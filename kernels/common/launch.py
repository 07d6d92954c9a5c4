"""How every Triton kernel is launched, or built ahead of its first launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bicompile.kernels.common.trees import INTERPRET, OPTIONS

_target: ContextVar[torch.device] = ContextVar("device that meta tensors stand for")


@triton.jit
def after_others(PDL: tl.constexpr):
    """Wait for all earlier kernels; the next one may prepare itself meanwhile (sm_90 and later).

    Programmatic dependent launch: nothing may be read or written before this line.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@contextmanager
def building_for(device: torch.device) -> Iterator[None]:
    """Let meta tensors stand for tensors of a device: launches build kernels and run nothing."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def launch(kernel, grid, *args, **options):
    """Run a kernel on a grid (or a number of programs); with meta tensors only build it."""
    first = next(a for a in args if isinstance(a, torch.Tensor))
    options |= OPTIONS
    options["PDL"] = _overlaps(_real(first.device))
    if options["PDL"]:
        options["launch_pdl"] = True
    if first.is_meta:
        kernel.warmup(*args, grid=(1,), **options)
    else:
        kernel[grid if isinstance(grid, tuple) else (grid,)](*args, **options)


def capability(device: torch.device) -> str:
    """Compute capability, as "9.0"; the interpreter can do what the newest devices can."""
    device = _real(device)
    if device.type != "cuda":
        return "9.0"
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    device = _real(device)
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_aligned(x: torch.Tensor) -> bool:
    """Whether x starts at a multiple of 16 bytes; a meta tensor is taken to."""
    return x.data_ptr() % 16 == 0


def _real(device: torch.device) -> torch.device:
    return _target.get() if device.type == "meta" else device


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may overlap the end of the one before."""
    return (
        not INTERPRET.value
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
