"""Certificates: which schedules of the GPU kernels have shown equal bits on a type of machine.

An order of summation is pinned; that its schedules (tiles, warps, stages) keep it follows from what
Triton and the hardware do, so it is tested: `bicompile verify` sweeps them and writes down those
with equal bits.  A launch asks `choose`, which gives the schedule of its table if the certificate
of this machine lists it, and the one schedule that serves every size if not.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import random
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from bicompile.errors import DamagedCertificate

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parent / "kernels"
PACKAGED = Path(__file__).parent / "certificates"
USER = Path(platformdirs.user_data_dir("bicompile")) / "certificates"
"""Where `bicompile verify` writes; it comes before what the package brings: nearer evidence."""

FORMAT = 1
TABLE = "table"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

S = TypeVar("S")


@dataclass(frozen=True)
class Machine:
    """What the bits of a compiled kernel depend on, besides its source.

    Args:
        gpu: name of the GPU.
        capability: its compute capability, which fixes the instructions.
        triton: version of the compiler; its wheel brings ptxas and the library of functions.
        torch: release of PyTorch, without the build: each release comes with one build of Triton.

    The driver is not part of it: Triton hands it finished machine code, which it loads as it is.
    """

    gpu: str
    capability: str
    triton: str
    torch: str

    @classmethod
    def here(cls, device: int) -> Machine:
        """The machine of a CUDA device; for -1, Triton's interpreter."""
        import torch
        import triton

        versions = triton.__version__, torch.__version__.partition("+")[0]
        if device < 0:
            return cls("Triton's interpreter", "0.0", *versions)
        capability = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), ".".join(map(str, capability)), *versions)

    @property
    def file(self) -> str:
        """Name of the certificate of this machine: there is at most one in a folder."""
        parts = self.gpu, f"sm{self.capability}", f"triton{self.triton}", f"torch{self.torch}"
        return re.sub(r"[^a-z0-9.]+", "-", "_".join(parts).lower()) + ".json"

    def __str__(self) -> str:
        return f"{self.gpu} (sm {self.capability}), Triton {self.triton}, torch {self.torch}"


@dataclass(frozen=True)
class Listing:
    """The members of a bit class.

    Args:
        schedules: those with equal bits, the single one first.
        cases: how many results of each were compared.
        digest: of the bits of all results, to compare one machine with another.
    """

    schedules: tuple[str, ...]
    cases: int
    digest: str


@dataclass(frozen=True)
class Family:
    """The bit classes of a family, and the digest of the sources they were found with."""

    sources: str
    classes: Mapping[str, Listing]


@dataclass(frozen=True)
class Certificate:
    """What `bicompile verify` found on a machine.

    Args:
        machine: where it holds.
        families: the members of every bit class, by family.
        notes: what else was there (driver, builds, date); not part of the comparison.
    """

    machine: Machine
    families: Mapping[str, Family]
    notes: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the certificate into a folder, under the name of its machine; returns the path."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        forget()
        return Path(file.name).replace(folder / self.machine.file)

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Read a certificate.

        Raises:
            DamagedCertificate: the file is not what was written, or was written for another name.
        """
        try:
            content = json.loads(path.read_text())
            checksum = content.pop("checksum")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedCertificate(file=path, reason="it is cut off or no certificate") from None
        if checksum != _checksum(content):
            raise DamagedCertificate(file=path, reason="its content does not have its checksum")
        if content["format"] != FORMAT:
            reason = f"its format is {content['format']}, not {FORMAT}"
            raise DamagedCertificate(file=path, reason=reason)
        families = {
            name: Family(
                family["sources"],
                {
                    bit_class: Listing(tuple(x["schedules"]), x["cases"], x["digest"])
                    for bit_class, x in family["classes"].items()
                },
            )
            for name, family in content["families"].items()
        }
        certificate = cls(Machine(**content["machine"]), families, content["notes"])
        if certificate.machine.file != path.name:
            reason = f"it was written for another machine: {certificate.machine}"
            raise DamagedCertificate(file=path, reason=reason)
        return certificate


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def certificates(machine: Machine) -> tuple[Certificate, ...]:
    """The certificates of a machine, those of the user first.

    Raises:
        DamagedCertificate: one of them is not as it was written.
    """
    paths = (folder / machine.file for folder in (USER, PACKAGED))
    return tuple(Certificate.read(path) for path in paths if path.exists())


# ------------------------------------------------------------------------------------- sources


def chooses(family: str) -> bool:
    """Whether launches of a family choose among schedules: if not, there is nothing to certify."""
    return any(name.endswith("schedules.py") for name in _files(family))


@functools.cache
def sources(family: str) -> str:
    """Digest of all that decides the bits of a family: its `gpu.py` and what that imports of ours.

    A certificate of other sources says nothing about these. Files named TABLE are left out: they
    choose among what is listed.
    """
    hashed = hashlib.sha256()
    for name, source in sorted(_files(family).items()):
        hashed.update(name.encode() + b"\0" + source + b"\0")
    return hashed.hexdigest()


def _files(family: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    _collect(KERNELS / family / "gpu.py", found)
    return found


def _collect(path: Path, found: dict[str, bytes]) -> None:
    name = str(path.relative_to(KERNELS))
    if name in found or not path.exists():
        return
    found[name] = path.read_bytes()
    for node in ast.walk(ast.parse(found[name])):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("bicompile.kernels.") and not module.endswith(f".{TABLE}"):
                _collect(KERNELS.joinpath(*module.split(".")[2:]).with_suffix(".py"), found)


# -------------------------------------------------------------------------------------- choice

_state = threading.local()


@contextlib.contextmanager
def one_schedule() -> Iterator[None]:
    """Launch every kernel of this thread on the single schedule of its class, for a while."""
    before = getattr(_state, "single", False)
    _state.single = True
    try:
        yield
    finally:
        _state.single = before


@contextlib.contextmanager
def random_schedules(seed: int = 0) -> Iterator[None]:
    """Launch every kernel of this thread on any schedule of its class, drawn anew for each launch.

    Certified or not: a test of the claim that no bit follows the choice.
    """
    before = getattr(_state, "draw", None)
    _state.draw = random.Random(seed)
    try:
        yield
    finally:
        _state.draw = before


def choose(
    family: str, bit_class: str, wanted: S, single: S, among: Callable[[], Sequence[S]]
) -> S:
    """The schedule of a launch: `wanted`, else the last before it that the certificate lists.

    One of a table may not run on a machine with less memory, or be new.  Where the certificate
    lists none of them it is `single`, which needs no certificate; all give the same bits.
    `among` gives all schedules that could serve, in the order of their table.

    Raises:
        DamagedCertificate: the certificate is not as it was written.
    """
    draw: random.Random | None = getattr(_state, "draw", None)
    if draw is not None:
        return draw.choice(among())
    if wanted == single or getattr(_state, "single", False):
        return single
    if permits(family, bit_class, wanted):
        return wanted
    if not _listed(_device(), family, bit_class):
        return single
    known = among()
    before = known[: known.index(wanted)] if wanted in known else ()
    return next((s for s in reversed(before) if permits(family, bit_class, s)), single)


def permits(family: str, bit_class: str, schedule: object) -> bool:
    """Whether the certificate of the current device lists a schedule; says once if there is none.

    Raises:
        DamagedCertificate: the certificate is not as it was written.
    """
    return _permits(_device(), family, bit_class, schedule)


@functools.cache
def _permits(device: int, family: str, bit_class: str, schedule: object) -> bool:
    listed = _listed(device, family, bit_class)
    if listed and repr(schedule) not in listed:
        machine = Machine.here(device)
        log.info("%s, %s: %s is not certified on %s", family, bit_class, schedule, machine)
    return repr(schedule) in listed


@functools.cache
def _listed(device: int, family: str, bit_class: str) -> tuple[str, ...]:
    """The schedules that the certificate lists; where there is none, that is said once."""
    machine = Machine.here(device)
    listing, reason = _find(machine, family, bit_class)
    if listing is None:
        _say_once(machine, reason)
        return ()
    return listing.schedules


def _find(machine: Machine, family: str, bit_class: str) -> tuple[Listing | None, str]:
    """The listing of a bit class, or why there is none."""
    reason = "there is no certificate"
    for certificate in certificates(machine):
        entry = certificate.families.get(family)
        if entry is None:
            reason = f"no certificate covers the {family} kernels"
        elif entry.sources != sources(family):
            reason = f"the certificate is of other sources of the {family} kernels"
        elif bit_class in entry.classes:
            return entry.classes[bit_class], ""
        else:
            reason = f"the certificate does not cover {family} kernels of class {bit_class}"
    return None, reason


_told: set[Machine] = set()


def _say_once(machine: Machine, reason: str) -> None:
    if machine in _told:
        return
    _told.add(machine)
    warnings.warn(
        f"{reason} for {machine}: what is not certified runs on one schedule for all sizes, with "
        "the same bits and less speed; to certify this machine, run `bicompile verify` on it once",
        stacklevel=2,
    )


def _device() -> int:
    if INTERPRETED:
        return -1
    import torch

    return torch.cuda.current_device()


def forget() -> None:
    """Read certificates and sources anew at the next launch."""
    for cached in (certificates, _listed, _permits, sources):
        cached.cache_clear()
    _told.clear()
