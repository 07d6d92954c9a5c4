"""The machine and the versions that stand beside every figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from bicompile.errors import UnsafeSetting

_PACKAGES = ("torch", "triton", "transformers", "bicompile")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Name the hardware, the software and their versions, for a report."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with the build
    return found


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UnsafeSetting: PyTorch sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UnsafeSetting(
            setting="--device",
            value="cuda",
            reason="PyTorch sees no GPU here",
            accepted=["cpu"],
            todo="leave the option out, or install a CUDA build of torch and a driver",
        )


def title(found: dict[str, Any]) -> str:
    """One line of what `machine` found."""
    chip = found.get("gpu") or f"{found['cpu']} ({found['cores']} cores, {found['isa']})"
    return f"{chip}, torch {found['torch']}, {found['threads']} CPU threads"


def _cpu_name() -> str:
    """The name the kernel gives; `platform` knows only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
