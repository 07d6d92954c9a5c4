"""How every Triton kernel is launched."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bicompile.kernels.common.trees import INTERPRET, OPTIONS


@triton.jit
def after_others(PDL: tl.constexpr):
    """Wait for all earlier kernels; the next one may prepare itself meanwhile (sm_90 and later).

    Programmatic dependent launch: nothing may be read or written before this line.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may overlap the end of the one before."""
    return (
        not INTERPRET.value
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@functools.cache
def capability(device: torch.device) -> str:
    """Compute capability, as "9.0"; the interpreter can do what the newest devices can."""
    if device.type != "cuda":
        return "9.0"
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_aligned(x: torch.Tensor) -> bool:
    """Whether x starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0


def launch(kernel, grid, *args, **options):
    """Run a kernel on a grid (or a number of programs)."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    options["PDL"] = _overlaps(device)
    if options["PDL"]:
        options["launch_pdl"] = True
    kernel[grid if isinstance(grid, tuple) else (grid,)](*args, **options, **OPTIONS)
