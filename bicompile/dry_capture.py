"""All private use of PyTorch for capturing a program without running it, and for its traces.

Weights and inputs become tensors without memory, Dynamo is left as soon as the graph is seen, and
what goes wrong on the way is said in our words.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.exc import (
    BackendCompilerFailed,
    ShortenTraceback,
    TorchDynamoException,
    TorchRuntimeError,
)
from torch._logging._internal import LazyTraceHandler, trace_log, trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from bicompile import graph
from bicompile.errors import BicompileError, Untraceable, WrongInputs

_OWNED = re.compile(r"\._(?:modules|parameters|buffers)\b")
_PARTS = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.([^_\W]\w*)")


class Captured(ShortenTraceback):
    """Leaves torch.compile once a graph is explained: nothing is run."""


# What Dynamo says went wrong, the most telling first.
_SAID = tuple(
    map(re.compile, (r"got \w+\([\"'](.*?)[\"']\)", r"raised exception (.*)", r"Explanation: (.*)"))
)


@contextlib.contextmanager
def failures(given: str) -> Iterator[None]:
    """Say what Dynamo says in our words.

    Raises:
        Untraceable: the program does not fit in one graph.
        WrongInputs: an op of the program does not take what it is given.
    """
    try:
        yield
    except (Captured, BicompileError, BackendCompilerFailed):
        raise
    except TorchDynamoException as error:
        said = (pattern.search(str(error)) for pattern in _SAID)
        reason = next((match[1] for match in said if match), str(error))
        stack = getattr(error, "real_stack", None)
        line = graph.frame_line(stack[-1]) if stack else None
        if isinstance(error, TorchRuntimeError) or "Argument mismatch" in reason:
            raise WrongInputs(reason=reason, given=given, line=line) from error
        raise Untraceable(reason=reason, line=line) from error
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise WrongInputs(reason=str(error).split("\n")[0], given=given) from error


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Capture as if the function had never been captured with other shapes, and leave no trace."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


@contextlib.contextmanager
def placed(model: Any, tensors: Any, device: str | None) -> Iterator[Any]:
    """The tensors without memory, on `device`, and the model's own replaced by such meanwhile.

    Where `device` is None, they stay as they are, unless one is on the device "meta": then all go
    to the CPU.
    """
    mode, known = FakeTensorMode(), dict[int, Any]()

    def place(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or where is None:
            return x
        if id(x) not in known:  # tied weights stay tied
            new: Any = FakeTensor(mode, x.detach().to("meta"), where)
            if isinstance(x, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=x.requires_grad)
            known[id(x)] = new
        return known[id(x)]

    owned: list[dict[str, Any]] = [
        holder
        for module in (model.modules() if isinstance(model, torch.nn.Module) else ())
        for holder in (module._parameters, module._buffers)
    ]
    saved = [dict(holder) for holder in owned]
    where = None if device is None else torch.device("cuda:0" if device == "cuda" else device)
    if where is None and any(_is_meta(x) for x in tree_leaves((tensors, saved))):
        where = torch.device("cpu")
    try:
        for holder in owned:
            holder.update({name: place(x) for name, x in holder.items()})
        yield tree_map(place, tensors)
    finally:
        for holder, before in zip(owned, saved, strict=True):
            holder.update(before)


def _is_meta(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "meta"


def input_names(gm: GraphModule) -> list[str]:
    """What the user calls the inputs of a captured graph.

    Parameters and buffers have their path, ``model.layers.0.weight``; the rest is ``input x``.
    """
    names = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None) or node.name
        text = name() if callable(name) else name
        owned = _OWNED.search(text)
        parts = ["".join(m) for m in _PARTS.findall(text[owned.start() if owned else 0 :])]
        names.append(".".join(parts) if owned else f"input {'.'.join(parts) or node.name}")
    return names


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Hand a text to TORCH_TRACE, beside PyTorch's own artifacts of this graph."""
    metadata = {"name": name, "encoding": encoding}
    trace_structured("artifact", metadata_fn=lambda: metadata, payload_fn=payload)


def traces() -> bool:
    """Whether a structured trace is being written: PyTorch drops its handler if there is none."""
    return any(isinstance(handler, LazyTraceHandler) for handler in trace_log.handlers)
