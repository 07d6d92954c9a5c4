"""Builds and loads the C++ kernels: once per machine, one library per family, when one is needed.

A library's name in the cache is the hash of everything that made it (sources, flags, compiler,
torch, instruction set), so a library is right if it is there; a checksum beside it shows that it is
whole.  Libraries are made by ``build`` in parallel, written to a temporary name and renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import platformdirs
import torch

from bicompile.errors import CompilationFailed, CompilerNotFound

log = logging.getLogger("bicompile.native")

KERNELS = Path(__file__).parent / "kernels"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "plain": (),
}
"""Instruction sets, best first, with the flags of each: never ``-march=native``, which would tie a
shared cache folder to one machine."""

FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    # No fma that the source does not name, no errno: bits depend on the source alone.
    *("-ffp-contract=off", "-fno-math-errno"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
)

_INCLUDED = re.compile(r'^#include "(.+)"', re.MULTILINE)
_OF_DOT_PRODUCTS = ("matmul", "convolution")  # families that use vdpbf16ps where a machine has it

_lock = threading.Lock()
_loaded: dict[str, str] = {}  # the instruction set of each family


def isa() -> str:
    """Return the best instruction set of this machine: a key of ``ISA_FLAGS``."""
    return next(name for name in ISA_FLAGS if runs(name))


def runs(isa: str) -> bool:
    """Whether this machine has an instruction set."""
    return {_cpuinfo_name(flag) for flag in ISA_FLAGS[isa]} <= _cpu_features()


def _cpuinfo_name(flag: str) -> str:
    return {"-mavx512bf16": "avx512_bf16"}.get(flag, flag.removeprefix("-m"))


@cache
def _cpu_features() -> frozenset[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def families() -> list[str]:
    """Return the names of the families that have a C++ kernel."""
    return sorted(source.parent.name for source in KERNELS.glob("*/cpu.cpp"))


def compiler() -> str:
    """Return the path of the C++ compiler: ``CXX``, else g++, else clang++.

    Raises:
        CompilerNotFound: there is none.
    """
    tried = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in tried:
        if path := shutil.which(name):
            return path
    raise CompilerNotFound(tried=tried)


@cache
def _compiler_version(path: str) -> str:
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return run.stdout.partition("\n")[0]


def cache_folder() -> Path:
    """Return the folder of the built libraries."""
    return Path(platformdirs.user_cache_dir("bicompile")) / "native"


def load(needed: Iterable[str] | None = None, *, isa: str | None = None) -> None:
    """Build what is missing and load each family once per process.

    Args:
        needed: names of families; without it, all.
        isa: instruction set of those that are not loaded yet; without it, the best.

    Raises:
        CompilerNotFound: a library has to be built and there is no C++ compiler.
        CompilationFailed: the compiler refused a source.
    """
    with _lock:
        wanted = isa or _default_isa()
        new = sorted(set(families() if needed is None else needed) - set(_loaded))
        dots = [family for family in new if family in _OF_DOT_PRODUCTS]
        if dots and wanted == "avx512_bf16" and not _dot_is_exact():
            log.warning("vdpbf16ps of this processor rounds in its own way: not used")
            _load_libraries(dots, "avx512")
        _load_libraries([family for family in new if family not in _loaded], wanted)


def _load_libraries(names: list[str], isa: str) -> None:
    for family, library in build(isa, names).items():
        _load_library(library, isa)
        _loaded[family] = isa


def _default_isa() -> str:
    return isa()


def _dot_is_exact() -> bool:
    """Whether the bfloat16 dot product of the processor has the bits that the kernels promise.

    If not, the libraries of _OF_DOT_PRODUCTS register nothing.
    """
    library = build("avx512_bf16", ["matmul"])["matmul"]
    return bool(ctypes.CDLL(str(library)).bicompile_matmul_is_exact())


def _load_library(library: Path, wanted: str) -> None:
    try:
        torch.ops.load_library(library)
    except OSError:  # whole, yet not loadable: made for another loader or C++ library
        log.warning("rebuilding %s: it does not load", library)
        library.unlink(missing_ok=True)
        family = library.name.partition("-")[0]
        torch.ops.load_library(build(wanted, [family])[family])


def build(isa: str | None = None, needed: Iterable[str] | None = None) -> dict[str, Path]:
    """Return the library of each needed family (or of all), building what is not cached."""
    wanted = isa or _default_isa()
    names = families() if needed is None else needed
    libraries = {family: _library(family, wanted) for family in names}
    missing = [family for family, path in libraries.items() if not _is_whole(path)]
    if missing:
        compiler()  # before any thread starts, so that the error is raised once
        log.info("building CPU kernels (%s): %s", wanted, ", ".join(missing))
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for _ in pool.map(lambda f: _compile(f, libraries[f], wanted), missing):
                pass
        log.info("built CPU kernels in %.1f s", time.perf_counter() - start)
    return libraries


def _flags(isa: str) -> list[str]:
    return [*FLAGS, *ISA_FLAGS[isa]]


def _library(family: str, isa: str) -> Path:
    parts = [*_flags(isa), torch.__version__]
    for name, text in sorted(_sources(KERNELS / family / "cpu.cpp").items()):
        parts += [name, text]
    digest = hashlib.sha256()
    for part in [*parts, _compiler_identity()]:
        digest.update(part.encode() + b"\0")
    return cache_folder() / f"{family}-{isa}-{digest.hexdigest()[:24]}.so"


def _sources(path: Path) -> dict[str, str]:
    """The text of a source and of all headers of ours that it includes."""
    found: dict[str, str] = {}
    waiting = [path]
    while waiting:
        source = waiting.pop()
        name = str(source.relative_to(KERNELS))
        if name not in found:
            found[name] = source.read_text()
            included = _INCLUDED.findall(found[name])
            waiting += [Path(os.path.normpath(source.parent / header)) for header in included]
    return found


def _compiler_identity() -> str:
    try:
        path = compiler()
    except CompilerNotFound:
        return _remembered_compiler()
    return _compiler_version(path)


def _remembered_compiler() -> str:
    note = cache_folder() / "compiler"
    return note.read_text() if note.exists() else ""


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    try:
        return _checksum(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _compile(family: str, library: Path, isa: str) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        command = [
            *(compiler(), *_flags(isa), str(KERNELS / family / "cpu.cpp"), "-o", str(temporary)),
            *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", "-w"),
            *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise CompilationFailed(command=" ".join(command), output=run.stderr[-4000:])
        checksum = hashlib.sha256(temporary.read_bytes()).hexdigest()
        _replace(checksum.encode(), _checksum(library))
        temporary.replace(library)
        _replace(_compiler_version(compiler()).encode(), cache_folder() / "compiler")


def _replace(content: bytes, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
