"""One process of the bench: holds one system and times it when told to.

Requests and replies are JSON, one a line; `bicompile.bench.processes` is the other end.
A process holds one system only, so that no cache, patch or guard of one meets the other.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from bicompile.bench.cases import Case, Sequences, Shapes, System


class Work(Protocol):
    """What a worker holds: one part of the bench under one system."""

    def first(self, case: Case) -> float:
        """Make a case ready; returns the seconds of its first call, which compiles."""

    def sample(self, case: Case, calls: int) -> float:
        """Seconds of one call of a case, from so many calls."""

    def digests(self, case: Case) -> list[str]:
        """A digest of the bits of each row of a case."""

    def forget(self, counts: bool = True) -> None:
        """Give up what the cases so far hold; `counts`: whether the memory that they took does."""

    def memory(self) -> float:
        """The peak of the memory that counts, in MB."""


def make_work(settings: dict[str, Any]) -> Any:
    """The work that the settings name."""
    system = System(**settings["system"])
    device, dtype = settings["device"], settings["dtype"]
    if settings["part"] == "limits":
        from bicompile.bench.limits import Limits

        return Limits(device, dtype)
    if settings["part"] == "ops":
        from bicompile.bench.ops import OpWork

        return OpWork(system, device, dtype, settings["rows"])
    if settings["part"] == "sequences":
        from bicompile.bench.sequences import SequencesWork

        shapes, sequences = Shapes(**settings["shapes"]), Sequences(**settings["sequences"])
        return SequencesWork(system, shapes, sequences, device, dtype)
    if settings["part"] == "training":
        from bicompile.bench.training import TrainingWork

        return TrainingWork(system, make_model(settings), device)
    if settings["shapes"] is None:
        from bicompile.bench.real_model import RealModel

        return RealModel(system, settings["model"], device, dtype)
    from bicompile.bench.random_model import RandomModel

    return RandomModel(system, Shapes(**settings["shapes"]), device, dtype)


def make_model(settings: dict[str, Any]) -> Any:
    """The real or the random model that the settings name."""
    device, dtype = settings["device"], settings["dtype"]
    if settings["shapes"] is None:
        from bicompile import models
        from bicompile.bench.systems import dtype_named

        return models.load(settings["model"], dtype=dtype_named(dtype), device=device)[0]
    from bicompile.bench.random_model import build

    return build(Shapes(**settings["shapes"]), device, dtype)


def answer(work: Any, request: dict[str, Any]) -> Any:
    """Do what a request asks for: a method of the work by name, with its case and arguments."""
    do, case, more = request["do"], request["case"], request["more"]
    arguments = [Case(*case)] if case else []
    return getattr(work, do)(*arguments, **more)


def serve(settings: dict[str, Any], requests: Any, reply: Callable[[Any], None]) -> None:
    """Load, then answer requests until there are no more; one that fails ends only itself."""
    import torch

    torch.set_num_threads(settings["threads"])
    work = make_work(settings)
    reply("ready")
    with torch.no_grad():
        for line in requests:
            try:
                reply(answer(work, json.loads(line)))
            except Exception as error:
                traceback.print_exc()
                reply(failure(error))


def failure(error: Exception) -> dict[str, str]:
    """An error as a reply: its class and the first line of its text that says anything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"error": ": ".join([type(error).__name__, *lines[:1]])}


def main() -> None:
    """Serve on stdin and stdout; whatever else prints to stdout goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        serve(json.loads(sys.argv[1]), sys.stdin, reply)
    except Exception as error:
        reply(failure(error))
        raise


if __name__ == "__main__":
    main()
