"""What is searched: all registered ops, and small models of every kind."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from bicompile import registry
from bicompile.capture import any_number_of_recompilations
from bicompile.errors import UnknownSubject
from bicompile.testing import InvarianceViolation
from bicompile.testing.plan import plan

MODELS = (
    *("Llama", "Qwen3", "Gemma 2", "Phi", "GPT-2", "OPT", "Mixtral", "gpt-oss", "BERT"),
    *("ModernBERT", "ViT", "ResNet", "ConvNeXt", "LSTM", "GRU", "TransformerEncoder"),
    *("MultiheadAttention", "GroupNorm", "Conv2d", "U-Net", "MLP"),
)
"""Of the zoo of `bicompile coverage`."""
OF_OPS = {"cpu": 64, "cuda": 256}
"""Cases of a block of an op; on a GPU they are alike, or most time would go into compiling."""
_TOKENS = ("text decoder", "mixture of experts", "text encoder")
_VOCABULARY = 97
_MOST, _LONGEST = 9, 64
_DRAWS = 4  # of one case of a model; the first is the simplest that there is


def ops(modules: Sequence[str] = ()) -> list[str]:
    """The names of all ops, after importing modules that register more."""
    for module in modules:
        importlib.import_module(module)
    registry.load_all()
    return [*registry.KERNELS, *(kernel.name for kernel in registry.OTHERS.values())]


def chosen(only: Sequence[str] | None, modules: Sequence[str] = ()) -> list[str]:
    """The subjects that are named, or all.

    Raises:
        UnknownSubject: there is none of that name.
    """
    known = [*ops(modules), *MODELS]
    for name in only or ():
        if name not in known:
            raise UnknownSubject(name=name, accepted=known)
    return known if only is None else list(dict.fromkeys(only))


def check(name: str, number: int, device: str) -> tuple[str, str]:
    """Run a case of an op or a model.

    Returns:
        the law or property, and what broke it with a way to reproduce it; "" if it holds.
    """
    return _check_model(name, number, device) if name in MODELS else _check_op(name, number, device)


def _check_op(name: str, number: int, device: str) -> tuple[str, str]:
    alike = OF_OPS[device] if device == "cuda" else 1
    case = plan(name, registry.find(name).contract, number, alike)
    try:
        case.check(device)
    except Exception as error:  # a crash is found as well as another bit
        return case.law, f"{_told(error)}\n{case.call(device)}"
    return case.law, ""


def _told(error: Exception) -> str:
    return (
        str(error) if isinstance(error, InvarianceViolation) else f"{type(error).__name__}: {error}"
    )


def _check_model(name: str, number: int, device: str) -> tuple[str, str]:
    from bicompile.testing.search import applying, search

    law = "is made"
    try:
        subject = _subject(name, device)
        properties = [p for p in applying(subject, 9) if p != "static and dynamic"]  # compiles anew
        law = properties[number % len(properties)]
        with any_number_of_recompilations():  # sizes, lengths and layouts are many
            search(subject, law, most=9, longest=_LONGEST, cases=_DRAWS, draws=number)
    except Exception as error:
        return (
            law,
            f"{_told(error)}\n(function and make_inputs: model(...) of bicompile.soak.subjects)",
        )
    return law, ""


@functools.lru_cache(1)  # compiled code stays in memory
def _subject(name: str, device: str) -> Any:
    import torch

    from bicompile.testing.subject import Subject

    torch.compiler.reset()  # what was compiled for other models is not asked whether it fits
    return Subject(*model(name, device))


def model(name: str, device: str = "cpu") -> tuple[Any, Callable[..., dict[str, Any]]]:
    """A model of the zoo with random weights, and what makes its inputs.

    Example:
        >>> module, make_inputs = model("MLP")
        >>> [*make_inputs(3)]
        ['x0']
    """
    import torch

    from bicompile.coverage.zoo import ZOO

    entry = ZOO[name]
    torch.manual_seed(0)
    module = entry.build().to(device, entry.dtype).eval().requires_grad_(False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    def tokens(batch_size: int, length: int) -> dict[str, Any]:
        return {"input_ids": torch.randint(3, _VOCABULARY, (batch_size, length)).to(device)}

    def inputs(batch_size: int) -> dict[str, Any]:
        return {n: t.to(device) for n, t in entry.inputs(module, batch_size).items()}

    return module, tokens if entry.kind in _TOKENS else inputs
