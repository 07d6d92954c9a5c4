"""Every error a user can meet, as a catalogue.

A message says what failed, where, what was given, what is accepted, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


def _text(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(str(v) for v in value) or "nothing"
    return str(value)


class BicompileError(RuntimeError):
    """Base class of all errors of this package.

    A subclass states its message as three templates, filled from the keyword fields given to the
    constructor: ``what`` failed, what is ``accepted``, and what to do ``next``.  The field ``line``
    (the user's source line) is appended where it is known.

    Example:
        >>> str(UnknownOption(option="fuell", value=3, accepted=["fuel"])).splitlines()[0]
        "unknown value 3 for option 'fuell' of the batch_invariant backend"
    """

    what: ClassVar[str] = "{what}"
    accepts: ClassVar[str] = ""
    next: ClassVar[str] = ""

    def __init__(self, *, line: str | None = None, **fields: object) -> None:
        self.line = line
        self.fields = fields
        texts = {name: _text(value) for name, value in fields.items()}
        parts = [self.what.format(**texts)]
        if line:
            parts.append(f"  at: {line}")
        if self.accepts:
            parts.append("  accepted: " + self.accepts.format(**texts))
        if self.next:
            parts.append("  next: " + self.next.format(**texts))
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # What torch.compile raises is of a class made at run time (`capture.error_boundary`).
        cls = next(c for c in type(self).__mro__ if "first_useful_frame" not in vars(c))
        fields = {name: _text(value) for name, value in self.fields.items()}
        return _rebuild, (cls, self.line, fields)


def _rebuild(cls: type[BicompileError], line: str | None, fields: dict[str, object]) -> object:
    return cls(line=line, **fields)


class UnsupportedOp(BicompileError):
    """An op of the graph has no invariant kernel and no reason to be invariant by itself."""

    what = "{op} cannot be made batch-invariant: {reason}\n  given: {given}"
    accepts = "ops of docs/ops.md and pointwise, view, copy and integer ops"
    next = (
        "rewrite the line with an accepted op, move it out of the compiled function, or pass "
        'options={{"unsupported": "allow"}} to run it as PyTorch does, without the guarantee'
    )


class UnsupportedDtype(BicompileError):
    """An op that has an invariant kernel was given a dtype that the kernel does not have."""

    what = "{op} has no invariant kernel for {dtype}\n  given: {given}"
    accepts = "{accepted}"
    next = (
        "cast the inputs, for example with .float(), or keep this line out of the compiled function"
    )


class UnsupportedDevice(BicompileError):
    """A graph runs on a device type for which no kernels exist."""

    what = "no invariant kernels exist for device type '{device}'"
    accepts = "cpu, cuda"
    next = "move the model and its inputs to one of these devices"


class UnsupportedGradient(BicompileError):
    """A gradient was asked for through an op that has only a forward kernel."""

    what = "a gradient needs {op}, which has no invariant backward kernel"
    accepts = "inference, and gradients through the ops of docs/ops.md"
    next = "call the compiled model under torch.no_grad() or torch.inference_mode()"


class RandomOp(BicompileError):
    """An op draws random numbers, so its value depends on the element's position in the batch."""

    what = "{op} draws random numbers by position in the batch, so it cannot be batch-invariant"
    next = (
        "in most models this is dropout: call model.eval(); otherwise draw the numbers outside the "
        'compiled function, or pass options={{"random": "allow"}}: '
        "deterministic for a seed and a shape, but not batch-invariant"
    )


class BatchStatistics(BicompileError):
    """A normalisation takes its statistics over the batch."""

    what = (
        "{op} takes its statistics over the batch, so a row depends on its neighbours\n"
        "  given: {given}"
    )
    next = (
        "call model.eval() to normalise by running statistics, use GroupNorm or LayerNorm, or pass "
        'options={{"batch_statistics": "allow"}}: deterministic, but not batch-invariant'
    )


class GraphBreak(BicompileError):
    """Dynamo could not capture the function in one graph; the rest would run unguarded."""

    what = "the model does not fit in one graph: {reason}"
    next = (
        "remove the cause (torch.compile(..., fullgraph=True) names it with its line), or pass "
        'options={{"graph_breaks": "allow"}}: what lies between the graphs is then not covered'
    )


class RecompileLimit(BicompileError):
    """The function was compiled for so many shapes that Dynamo would run the next one eagerly."""

    what = (
        "{function} needs more than {limit} graphs; PyTorch would run the next one eagerly, "
        "without the guarantee"
    )
    next = (
        "mark the varying sizes as dynamic (torch.compile(dynamic=True) or bicompile.compile), or "
        "raise torch._dynamo.config.recompile_limit"
    )


class SuppressedErrors(BicompileError):
    """``torch._dynamo.config.suppress_errors`` would turn every refusal into a silent eager run."""

    what = "torch._dynamo.config.suppress_errors is True: a refused graph would run eagerly, unseen"
    next = "set torch._dynamo.config.suppress_errors = False"


class UnknownOption(BicompileError):
    """An option of the backend, or its value, does not exist."""

    what = "unknown value {value} for option '{option}' of the batch_invariant backend"
    accepts = "{accepted}"
    next = "correct the option"


class UnsafeSetting(BicompileError):
    """The model is set up in a way for which the guarantee cannot hold."""

    what = "{setting} is {value}: {reason}"
    accepts = "{accepted}"
    next = "{todo}"


class CompilerNotFound(BicompileError):
    """No C++ compiler: the CPU kernels are built at first use."""

    what = "no C++ compiler found to build the CPU kernels\n  tried: {tried}"
    accepts = "g++ >= 11 or clang++ >= 14, by name in CXX or on PATH"
    next = "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"


class CompilationFailed(BicompileError):
    """The C++ compiler refused the CPU kernels."""

    what = "building the CPU kernels failed\n  command: {command}\n{output}"
    accepts = "g++ >= 11 or clang++ >= 14 with C++20"
    next = "name another compiler in the environment variable CXX"


class ModelNotFound(BicompileError):
    """A model named by the user could not be loaded."""

    what = "cannot load the model {model}: {reason}"
    accepts = (
        "a folder with a transformers model, a hub id, or nothing for the small built-in choice"
    )
    next = "check the name; a hub id needs a network connection or a filled cache"


class HashMismatch(BicompileError):
    """A downloaded file is not the one that was published."""

    what = "{file} has the wrong content\n  expected: sha256 {expected}\n  given: sha256 {actual}"
    next = "the file was removed; run the command again to fetch it anew"


class NetworkUnavailable(BicompileError):
    """A download failed."""

    what = "cannot download {model}\n{output}"
    next = "check the connection or pip's index settings, or name a local model with --model FOLDER"


class DamagedCertificate(BicompileError):
    """A certificate of GPU schedules is not the file that `bicompile verify` wrote."""

    what = "the certificate {file} is refused: {reason}"
    accepts = "a file as `bicompile verify` wrote it, under its own name"
    next = (
        "remove the file: the kernels then run on one schedule for all sizes; `bicompile verify` "
        "writes it anew (a file of the package: reinstall bicompile)"
    )


class GpuNotFound(BicompileError):
    """Schedules can only be certified on the GPU that is to run them."""

    what = "there is nothing to certify here: PyTorch sees no NVIDIA GPU"
    accepts = "a machine with an NVIDIA GPU; CPU kernels need no certificate"
    next = "run the command on the machine with the GPU, with a CUDA build of torch and a driver"


class SweepFailed(BicompileError):
    """A kernel did not compile, or crashed, while its schedules were swept."""

    what = "the sweep stopped at {problem}\n{output}"
    next = (
        "report it with the text above; its bit class was not certified, so its kernels run on one "
        "schedule for all sizes"
    )


class Untraceable(BicompileError):
    """A program to be explained could not be captured as one graph."""

    what = "the program cannot be captured as one graph: {reason}"
    next = (
        "remove the cause, or explain the part of the model that can be captured, "
        "for example one layer with its inputs"
    )


class WrongInputs(BicompileError):
    """A model to be explained does not take the inputs that it was given."""

    what = "the model fails on these inputs: {reason}\n  given: {given}"
    next = "call bicompile.explain(model, ...) with the arguments that you call the model with"


class ProgramNotFound(BicompileError):
    """The name of a program to be explained leads nowhere."""

    what = "cannot explain {name}: {reason}"
    accepts = (
        "a hub id, a folder with a config.json, or module:function, where function() returns "
        "(model, args) or (model, args, kwargs)"
    )
    next = "{todo}"


class GraphTooLarge(BicompileError):
    """A table of every node would be longer than anybody reads in a terminal."""

    what = "the table of all nodes has {rows} rows, too many for a terminal"
    accepts = "up to {limit} rows"
    next = "leave out --all, or write a page with --html FILE and search there"


class BrowserNotFound(BicompileError):
    """A page was to be shown or drawn on a machine without a browser."""

    what = "no browser found to {purpose}\n  tried: {tried}"
    accepts = "a browser on PATH; the page itself needs no network and opens anywhere"
    next = "open {file} on a machine with a browser, or install one (Debian: apt install chromium)"


class LockUnreadable(BicompileError):
    """A lock file cannot be read."""

    what = "cannot read the lock file {file}: {reason}"
    accepts = "a file written by bicompile explain --lock"
    next = "write it anew: bicompile explain MODEL --lock {file}"


class LockDiffers(BicompileError):
    """The program, a version or the machine would give other bits than the lock file says."""

    what = "not the numbers of {file}:\n{differences}"
    next = "restore what differs, or accept the new numbers: bicompile explain MODEL --lock {file}"


class LostDecision(BicompileError):
    """A pass left no word about a node; for those who write passes."""

    what = "no pass says what became of {node} ({op})"
    next = "record each rewrite with run.decide(node, reason), see passes/ in CONTRIBUTING.md"


class CoverageUnavailable(BicompileError):
    """What the survey of operations and models needs is not installed."""

    what = "cannot survey operations and models: {missing} is not installed"
    next = 'run: pip install "bicompile[coverage]"'


class RegistrationError(BicompileError):
    """A kernel, rule or contract is not consistent; for those who add ops."""

    what = "cannot register {name}: {reason}"
    next = "see 'Adding an op' in CONTRIBUTING.md"


class PackageNotFound(BicompileError):
    """A part of the package needs another package, which an extra brings."""

    what = "{need} needs the package {package}, which is not installed"
    next = 'pip install "bicompile[{extra}]"'


class UnknownProperty(BicompileError):
    """A property that is to be tested is not known, or cannot hold or fail here."""

    what = "cannot test the property {name!r}: {reason}"
    accepts = "{accepted}"
    next = "see docs/testing.md for what each property means and where it applies"


class UnknownSubject(BicompileError):
    """An op or model to be searched is not known."""

    what = "there is no op or model '{name}' to search"
    accepts = "{accepted}"
    next = "correct the name; for ops of your own, name the module that registers them with --load"


class StateDiffers(BicompileError):
    """A search that was interrupted is to be continued by another program."""

    what = "the cases in {file} are not of this program: {differences}"
    next = "name another file with --state, or remove this one: what it holds says nothing here"


class NoBatchAxis(BicompileError):
    """A result of a function whose rows are to be compared has no axis of the batch."""

    what = "result {number} of shape [{shape}] has no batch axis: the batch is {batch}, axis {axis}"
    accepts = "results with a row for each row of the inputs"
    next = 'name the axis with axes={{"return": ...}}, or return only what has rows'


def catalogue() -> Sequence[type[BicompileError]]:
    """All error classes a user can meet, in the order of this file."""
    return BicompileError.__subclasses__()
