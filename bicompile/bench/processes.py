"""The other end of `bicompile.bench.worker`: processes with one system each, asked from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from bicompile.bench.cases import Case


class WorkerFailed(Exception):
    """A worker process reported an error or died."""


class Racer(Protocol):
    """What can be asked."""

    def ask(self, do: str, case: Case | None = None, **more: Any) -> Any:
        """Answer a request, or raise WorkerFailed."""


class Worker:
    """One process with one system; see `running`."""

    def __init__(self, settings: Mapping[str, Any], cache: str) -> None:
        self.settings = dict(settings)
        self.cache = cache
        self.process: subprocess.Popen[str] | None = None
        self.failed: WorkerFailed | None = None

    def start(self) -> None:
        """Start the process without waiting for it."""
        command = [sys.executable, "-m", "bicompile.bench.worker", json.dumps(self.settings)]
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": self.cache,
            "TRITON_CACHE_DIR": f"{self.cache}/triton",
            "OMP_NUM_THREADS": str(self.settings["threads"]),
        }
        self.process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self.settings["debug"] else subprocess.DEVNULL,
            env=os.environ | environment,
        )

    def wait(self) -> None:
        """Wait until the process has loaded; if it cannot, every later request says so."""
        try:
            self._reply()
        except WorkerFailed as error:
            self.failed = error

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def ask(self, do: str, case: Case | None = None, **more: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            WorkerFailed: the request failed, or the process is dead; the text says which and why.
        """
        if self.failed:
            raise self.failed
        assert self.process is not None
        assert self.process.stdin is not None
        request = {"do": do, "case": [case.group, case.batch] if case else None, "more": more}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what the process said before it died is read below
        return self._reply()

    def _reply(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        name = self.settings["system"]["name"]
        if not line:
            self.failed = WorkerFailed(f"{name}: the process died")
            raise self.failed
        reply = json.loads(line)
        if isinstance(reply, dict) and "error" in reply:
            raise WorkerFailed(f"{name}: {reply['error']}")
        return reply


@contextmanager
def running(workers: Mapping[str, Worker]) -> Iterator[None]:
    """Start all processes, side by side, and end them afterwards."""
    try:
        for worker in workers.values():
            worker.start()
        for worker in workers.values():
            worker.wait()
        yield
    finally:
        for worker in workers.values():
            worker.end()


def ask_all(
    workers: Mapping[str, Racer], do: str, case: Case | None = None, *, at_once: bool, **more: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Ask every worker the same, in turn or `at_once`; the answers, and why others have none."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}

    def ask(name: str) -> None:
        try:
            answers[name] = workers[name].ask(do, case, **more)
        except WorkerFailed as error:
            failures[name] = str(error)

    with ThreadPoolExecutor(len(workers) or 1 if at_once else 1) as pool:
        list(pool.map(ask, workers))
    return answers, failures
