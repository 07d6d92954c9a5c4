"""What was found out about operations and models: a file that grows while the command works."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bicompile.report import Verdict

FAILED = "failed"
UNUSED = "no samples"
"""In a dtype for which PyTorch cannot make sample inputs."""
WORST_FIRST = (
    FAILED,
    Verdict.REFUSED.value,
    Verdict.ALLOWED.value,
    Verdict.DETERMINISTIC.value,
    Verdict.INVARIANT.value,
    UNUSED,
)
CLASSES = (Verdict.INVARIANT.value, Verdict.DETERMINISTIC.value, Verdict.REFUSED.value)
_LONGEST = 300
R = TypeVar("R")


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its text that says something."""
    lines = str(error).strip().splitlines() or [""]
    if lines[0].endswith("raised:") and len(lines) > 1:  # by a backend; the cause follows
        lines = lines[1:]
    return f"{type(error).__name__}: {lines[0]}"[:_LONGEST]


def _read(kind: type[R], entry: dict[str, Any]) -> R:
    gpu = entry.get("gpu")
    return kind(**{**entry, "gpu": gpu and OnGpu(**gpu)})


def worst(verdicts: Iterable[str]) -> str:
    """The verdict that counts where there are several."""
    return min(verdicts, key=WORST_FIRST.index)


@dataclass
class OnGpu:
    """What became of the same operation or model on a GPU.

    Args:
        verdict: "invariant" where all checks hold, "refused", or "failed".
        checks: the bit checks that hold.
        reason: why it was refused or failed.
    """

    verdict: str = Verdict.INVARIANT.value
    checks: list[str] = field(default_factory=list)
    reason: str = ""


@dataclass
class OpResult:
    """What became of one operation in one dtype.

    Args:
        verdict: of the sample that fares worst: one of `CLASSES`, or "failed" where something is
            wrong.
        samples: how many samples got each verdict.
        targets: the aten ops that reached our passes, with the verdicts on each.
        kernels: the ops of ours that took their places.
        reasons: why samples were refused or failed, each once.
        sample: the largest that can be compiled.
        checks: the bit checks that hold for it; None if it was not compiled.
        gpu: what became of that sample on a GPU; None if it did not run there.
    """

    verdict: str
    samples: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    sample: int | None = None
    checks: list[str] | None = None
    gpu: OnGpu | None = None

    def refuse(self, reason: str) -> None:
        """Write down that the sample is refused with other sizes."""
        self.verdict = Verdict.REFUSED.value
        self.samples[self.verdict] = self.samples.get(self.verdict, 0) + 1
        self.samples[Verdict.INVARIANT.value] -= 1
        self.reasons.append(f"for inputs of any size: {reason}")

    def fail(self, reason: str) -> None:
        """Write down what is wrong."""
        self.verdict = FAILED
        self.reasons.append(reason)


@dataclass
class ModelResult:
    """What became of one model.

    Args:
        kind: what sort of model it is.
        verdict: "invariant", "refused", or "failed" where bits differ or something else is wrong.
        checks: the bit checks that hold.
        open: checks that do not hold, and are known not to: each with the reason.
        reason: why it was refused or failed.
        graphs: how many were compiled.
        kernels: the ops of ours in them.
        gpu: what became of it on a GPU; None if it did not run there.
    """

    kind: str
    verdict: str
    checks: list[str] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    graphs: int = 0
    kernels: list[str] = field(default_factory=list)
    gpu: OnGpu | None = None


@dataclass
class Results:
    """All results: of operations by name and dtype, of models by name; and which GPU was used."""

    ops: dict[str, dict[str, OpResult]] = field(default_factory=dict)
    models: dict[str, ModelResult] = field(default_factory=dict)
    gpu: str = ""

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read a file that `save` wrote; empty if there is none."""
        if not file.exists():
            return cls()
        read = json.loads(file.read_text())
        ops = {n: {d: _read(OpResult, r) for d, r in by.items()} for n, by in read["ops"].items()}
        models = {n: _read(ModelResult, r) for n, r in read["models"].items()}
        return cls(ops, models, read.get("gpu", ""))

    def save(self, file: Path) -> None:
        """Write a file with a line for each operation and model; a reader never sees half of it."""
        written = {
            "ops": {
                n: {d: dataclasses.asdict(r) for d, r in by.items()} for n, by in self.ops.items()
            },
            "models": {n: dataclasses.asdict(r) for n, r in self.models.items()},
        }
        parts = [f'"gpu": {json.dumps(self.gpu)}']
        for part, entries in written.items():
            lines = (f" {json.dumps(n)}: {json.dumps(e)}" for n, e in sorted(entries.items()))
            parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}")
        scratch = file.with_suffix(".part")
        scratch.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        scratch.replace(file)

    def verdict(self, name: str) -> str:
        """The class of an operation: that of the dtype that fares worst."""
        return worst(r.verdict for r in self.ops[name].values())

    def on_gpu(self, name: str) -> str:
        """The class of an operation on a GPU, likewise; "" if it did not run there."""
        found = [r.gpu.verdict for r in self.ops[name].values() if r.gpu]
        return worst(found) if found else ""
