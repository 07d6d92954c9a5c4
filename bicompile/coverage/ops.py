"""Classifies every operation of PyTorch's own OpInfo database by compiling its sample inputs.

The only user of `torch.testing._internal`, a private interface: the database lists each operation
with inputs that reach its forms.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import bicompile
from bicompile.capture import Unsupported
from bicompile.coverage import checks
from bicompile.coverage.results import FAILED, UNUSED, WORST_FIRST, OpResult, first_line
from bicompile.errors import BicompileError, WrongInputs
from bicompile.explanation import Explanation
from bicompile.report import Verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLES = {"float32": 8, "bfloat16": 2, "float16": 2}
"""Sample inputs of an operation whose graphs are judged, spread over those that PyTorch has."""
COMPUTED = (Verdict.INVARIANT.value, Verdict.DETERMINISTIC.value)


@dataclass(frozen=True)
class Call:
    """One sample as a function of its tensors."""

    function: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]


@functools.cache
def database() -> dict[str, Any]:
    """The entries of PyTorch's database, by name."""
    from torch.testing._internal.common_methods_invocations import op_db

    return {op.formatted_name: op for op in op_db}


def names() -> list[str]:
    """The entries that have one of our dtypes on a CPU."""
    found = database().items()
    return [n for n, op in found if op.supported_dtypes("cpu") & {*DTYPES.values()}]


def samples(name: str, dtype: str) -> list[Call]:
    """Calls of an operation with each of its sample inputs."""
    torch.manual_seed(0)
    op = database()[name]
    # A seed for each sample, of which there may be thousands, is slow.
    return [_call(op, sample) for sample in op.sample_inputs("cpu", DTYPES[dtype], set_seed=False)]


def _call(op: Any, sample: Any) -> Call:
    """The sample as a function of its tensors, written such that little of it is traced."""
    apply = op.op
    tensors: list[torch.Tensor] = []

    def hole(x: Any) -> Any:
        """The number of a tensor; what holds no tensor, as it is; nests as functions."""
        if isinstance(x, torch.Tensor):
            tensors.append(x.detach())
            return _Hole(len(tensors) - 1)
        leaves, spec = tree_flatten(x)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return x
        return _Nest([hole(leaf) for leaf in leaves], spec)

    args = [hole(x) for x in (sample.input, *sample.args)]
    kwargs = {name: hole(x) for name, x in sample.kwargs.items()}

    def function(*tensors: torch.Tensor) -> Any:
        filled = {name: _fill(x, tensors) for name, x in kwargs.items()}
        return apply(*(_fill(x, tensors) for x in args), **filled)

    return Call(function, tuple(tensors))


@dataclass(frozen=True)
class _Hole:
    """The place of a tensor in the arguments of a call."""

    number: int


@dataclass(frozen=True)
class _Nest:
    """An argument with tensors inside."""

    leaves: list[Any]
    spec: Any


def _fill(x: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(x, _Hole):
        return tensors[x.number]
    if isinstance(x, _Nest):
        return tree_unflatten([_fill(leaf, tensors) for leaf in x.leaves], x.spec)
    return x


def judge(name: str) -> dict[str, OpResult]:
    """Judge the graphs of an operation's samples in each dtype that it has; nothing is compiled.

    Returns:
        the verdicts by dtype; nothing is raised for what goes wrong, it is written down.
    """
    has = database()[name].supported_dtypes("cpu")
    return {d: _judge(name, d) for d, dtype in DTYPES.items() if dtype in has}


def _judge(name: str, dtype: str) -> OpResult:
    judged = _Judge()
    try:
        calls = samples(name, dtype)
    except Exception as error:  # some inputs need ops that PyTorch has not in this dtype
        return OpResult(UNUSED, reasons=[first_line(error)])
    step = max(1, -(-len(calls) // SAMPLES[dtype]))
    verdicts = {i: judged(calls[i]) for i in range(0, len(calls), step)}
    good = [i for i, verdict in verdicts.items() if verdict in COMPUTED]
    for i, verdict in verdicts.items():
        if verdict == Verdict.REFUSED.value:
            try:
                _assert_refused(calls[i])
            except Exception as error:
                judged.fail(f"refusal: {first_line(error)}")
            break
    sizes = [sum(t.numel() for t in call.tensors) for call in calls]
    return judged.result(max(good, key=sizes.__getitem__) if good else None)


def check(name: str, dtype: str, sample: int, device: str = "cpu") -> list[str]:
    """Compile a sample and check its bits; see `bicompile.coverage.checks.check`."""
    if name not in database():  # results of another release
        raise checks.NotThere(f"PyTorch {torch.__version__} has it not")
    known = samples(name, dtype)
    call = known[min(sample, len(known) - 1)]  # another release may have fewer
    return checks.check(
        call.function,
        call.tensors,
        value="empty" not in name,
        device=device,
    )


class _Judge:
    """Explains one call after the other and writes down what it learns."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.targets: dict[str, set[str]] = {}
        self.kernels: set[str] = set()
        self.reasons: dict[str, None] = {}

    def __call__(self, call: Call) -> str:
        """The verdict of our passes on one call."""
        verdict, reason = self._judge(call)
        self.counts[verdict] += 1
        if reason:
            self.reasons[reason] = None
        return verdict

    def _judge(self, call: Call) -> tuple[str, str]:
        torch.compiler.reset()
        try:
            found = bicompile.explain(call.function, *call.tensors, dynamic=False)
        except WrongInputs as error:  # eager PyTorch takes them
            return FAILED, first_line(error)
        except BicompileError as error:
            return Verdict.REFUSED.value, first_line(error)
        except Exception as error:
            if checks.pytorch_fails(call.function, call.tensors):
                return Verdict.REFUSED.value, f"PyTorch cannot trace it either: {first_line(error)}"
            return FAILED, first_line(error)
        self._note(found)
        given = {row.verdict for row in found.rows}
        if found.refused:
            return Verdict.REFUSED.value, found.refused[0].rule.split("\n")[0]
        if Verdict.DETERMINISTIC in given:
            return Verdict.DETERMINISTIC.value, ""
        return Verdict.INVARIANT.value, ""

    def _note(self, found: Explanation) -> None:
        for row in found.rows:
            if row.target.startswith(("aten.", "prims.")):
                self.targets.setdefault(row.target, set()).add(row.verdict.value)
            if row.op.startswith("bicompile."):
                self.kernels.add(row.op.split(".")[1])

    def fail(self, reason: str) -> None:
        """Write down what is wrong."""
        self.counts[FAILED] += 1
        self.reasons[reason] = None

    def result(self, sample: int | None) -> OpResult:
        """All that was learnt."""
        return OpResult(
            verdict=next((v for v in WORST_FIRST if self.counts[v]), FAILED),
            samples=dict(self.counts),
            targets={target: sorted(found) for target, found in sorted(self.targets.items())},
            kernels=sorted(self.kernels),
            reasons=list(self.reasons),
            sample=sample,
        )


def _assert_refused(call: Call) -> None:
    """What is explained as refused is an error of ours, or of Dynamo, where it is compiled.

    Raises:
        AssertionError: it is compiled.
    """
    torch.compiler.reset()
    run = torch.compile(call.function, backend="batch_invariant", fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            run(*checks.copies(call.tensors))
    except (BicompileError, Unsupported):
        return
    except Exception:
        if checks.pytorch_fails(call.function, call.tensors):
            return
        raise
    raise AssertionError("compiled, although it was explained as refused")
