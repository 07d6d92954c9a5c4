"""What bits depend on besides the graph: versions, machine, settings and sources, by name."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bicompile import inductor, machine
from bicompile.registry import OPS

if TYPE_CHECKING:
    from bicompile.explanation import GraphExplanation

_KERNELS = Path(__file__).parent / "kernels"
_COMPILED = {"cpu": (".cpp", ".h"), "cuda": (".py",)}
"""Device -> the sources that its kernels are built from."""


def pins(graphs: Iterable[GraphExplanation], device: str) -> dict[str, str]:
    """Name -> value of everything that may change the bits of these graphs on a device.

    Schedules, threads, batch sizes and, on the CPU, the instruction set are not here: no bit
    follows them.  Functions without a body of ours come from the C library, so its version is here.
    """
    found = machine.machine("cpu")
    names = {"torch": str(found["torch"]), "bicompile": str(found["bicompile"])}
    if device == "cuda":
        names["triton"] = str(found["triton"])
        names["gpu architecture"] = _architecture()
    else:
        names["system"] = str(found["system"])
        names["C library"] = " ".join(platform.libc_ver())
    names["float32 matmul precision"] = torch.get_float32_matmul_precision()
    patches = inductor.config_patches(None, "")
    names |= {f"inductor {key}": str(patches[key]) for key in inductor.PINNED if key in patches}
    names["source of pointwise code"] = _digest([inductor.HEADER, Path(inductor.__file__)])
    families = {OPS[op.split(".")[1]].family for op in _ours(graphs)}
    for family in sorted(families):
        names[f"source of {family}"] = source_digest(family, device)
    return names


def _ours(graphs: Iterable[GraphExplanation]) -> set[str]:
    return {n.target for g in graphs for n in g.after if n.target.startswith("bicompile.")}


def source_digest(family: str, device: str) -> str:
    """Digest of the sources of a family's kernels for a device, what they share included."""
    return _digest(
        file
        for folder in (_KERNELS / family, _KERNELS / "common")
        for file in folder.iterdir()
        if file.suffix in _COMPILED[device]
    )


def _digest(files: Iterable[Path]) -> str:
    hashed = hashlib.sha256()
    for file in sorted(files):
        hashed.update(file.name.encode())
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


def _architecture() -> str:
    if not torch.cuda.is_available():
        return "none here"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
