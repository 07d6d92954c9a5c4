"""The same call in a fresh interpreter: ``python -m bicompile.testing.processes CALL RESULTS``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bicompile.errors import PackageNotFound, UnknownProperty
from bicompile.testing.subject import Batch, Subject

OTHER_PROCESS = "other process"


def rows_elsewhere(batch: Batch) -> list[torch.Tensor]:
    """The rows of a batch as an interpreter of its own computes them.

    It gets the function, the backend and the inputs, and has the same number of CPU threads.

    Raises:
        UnknownProperty: the function cannot be sent there, or the call fails there.
        PackageNotFound: cloudpickle is not installed.
    """
    subject = batch.subject
    kept = (subject.function, subject.backend, dict(subject.axes), batch.inputs, batch.size)
    with tempfile.TemporaryDirectory() as folder:
        call, results = Path(folder) / "call", Path(folder) / "results"
        call.write_bytes(_pickled((torch.get_num_threads(), *kept)))
        command = [sys.executable, "-m", "bicompile.testing.processes", str(call), str(results)]
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            _refuse(f"the call fails there\n{done.stderr.strip()}")
        found: list[torch.Tensor] = torch.load(results)
        return found


def _pickled(call: tuple[Any, ...]) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        need = f"the property {OTHER_PROCESS!r}"
        raise PackageNotFound(package="cloudpickle", need=need, extra="testing") from None
    try:
        sent: bytes = cloudpickle.dumps(call)
    except Exception as error:  # whatever an object's own __reduce__ raises
        _refuse(f"what is tested cannot be sent there: {error}")
    return sent


def _refuse(reason: str) -> Any:
    accepted = ["functions, modules, backends and inputs that cloudpickle can send"]
    raise UnknownProperty(name=OTHER_PROCESS, reason=reason, accepted=accepted) from None


def main(call: str, results: str) -> None:
    """Compute what `rows_elsewhere` asks for."""
    import cloudpickle

    threads, function, backend, axes, inputs, size = cloudpickle.loads(Path(call).read_bytes())
    torch.set_num_threads(threads)
    subject = Subject(function, _made_already, backend, axes)
    torch.save(subject.results(subject.run(inputs), size, range(size)), results)


def _made_already(batch_size: int) -> Mapping[str, Any]:
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
