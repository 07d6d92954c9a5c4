"""Helpers for rewriting FX graphs: insert a call, read shapes, name the user's line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)'
)
# PyTorch's own modules, and the wrapper in which a model is traced.
_NOT_THE_USERS = tuple(str(Path(file).parent) for file in (torch.__file__, __file__))


def value(x: Any) -> Any:
    """The fake value of a node; anything else is returned as it is."""
    return x.meta["val"] if isinstance(x, Node) else x


def narrow(x: Any) -> Any:
    """What float32 numbers were widened from, or x."""
    if x.target is not torch.ops.prims.convert_element_type.default or x.args[1] != torch.float32:
        return x
    return x.args[0] if value(x.args[0]).dtype in (torch.bfloat16, torch.float16) else x


def device_of(node: Node) -> torch.device:
    """Where an op runs: the device of its first tensor."""
    first = next(v for v in map(value, node.all_input_nodes) if isinstance(v, torch.Tensor))
    return first.device


def constant(x: Any) -> Any:
    """The number that a node stands for, with a guard that it stays; others as they are."""
    val = value(x)
    if isinstance(val, torch.SymInt):
        return int(val)
    return float(val) if isinstance(val, torch.SymFloat) else x


def user_line(node: Node) -> str | None:
    """The line of the user's program that a node came from, as ``file:line, in function: code``.

    The innermost one outside PyTorch's own modules and this package, if there is one.
    """
    frames = [m.groupdict() for m in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    if not frames:
        return None
    outside = [f for f in frames if not f["file"].startswith(_NOT_THE_USERS)]
    frame = (outside or frames)[-1]
    return f"{frame['file']}:{frame['line']}, in {frame['function']}: {frame['code'].strip()}"


def frame_line(frame: Any) -> str:
    """The same of a frame of a stack."""
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"


def describe(x: Any) -> str:
    """A value as the user thinks of it: ``bfloat16[8, s0, 64]``."""
    if isinstance(x, Node) and "val" not in x.meta:  # a graph that the node calls
        return str(x.target)
    x = value(x)
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{[str(s) for s in x.shape]}".replace("'", "")
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(describe(v) for v in x)}]"
    return str(x)


def describe_call(node: Node) -> str:
    """The arguments of a call."""
    named = [f"{k}={describe(v)}" for k, v in node.kwargs.items()]
    return ", ".join([*(describe(a) for a in node.args), *named])


def target_name(node: Node) -> str:
    """What a node calls, in short: ``aten.add.Tensor``, ``getitem``."""
    if isinstance(node.target, (str, torch._ops.OpOverload)):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def hint(size: Any) -> int:
    """A size as a number: a symbolic one by the example that it was traced with."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return 1 if known is None else int(known)  # a size that the data decides is not known


ORIGINS = "bicompile_origins"
"""Key of ``node.meta``: the nodes of the captured graph that a node stands for, by name."""


def origins(node: Node) -> tuple[str, ...]:
    """Names of the captured nodes that a node stands for; none where nobody keeps account."""
    found: tuple[str, ...] = node.meta.get(ORIGINS, ())
    return found


def carry_origins(new: Node, *old: Node) -> None:
    """Let a node stand for all that `old` stood for, besides what it stands for already."""
    if merged := tuple(dict.fromkeys(o for n in (new, *old) for o in origins(n))):
        new.meta[ORIGINS] = merged


def subgraphs(gm: GraphModule) -> Iterator[GraphModule]:
    """The module itself and every graph nested in it."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield module


_KEPT = ("stack_trace", "nn_module_stack", "original_aten", "source_fn_stack", ORIGINS)


def replace(old: Node, new: Node) -> None:
    """Let a node of the graph stand for another one, with its line and origins."""
    new.meta.update({k: old.meta[k] for k in _KEPT if k in old.meta})
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _padded(x: torch.Tensor, pad: Sequence[Any], fill: float = 0) -> torch.Tensor:
    """The fake of `aten.constant_pad_nd`: PyTorch's own makes a symbolic size a number."""
    sizes = list(x.shape)
    for axis, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        sizes[-axis] += before + after
    return x.new_empty(sizes)


_FAKES: dict[Any, Callable[..., Any]] = {torch.ops.aten.constant_pad_nd.default: _padded}


class Emit:
    """Inserts calls before a node, with fake values, and puts the last one in its place.

    Example:
        >>> emit = Emit(node)                                       # doctest: +SKIP
        >>> emit.take_place(emit(torch.ops.aten.add.Tensor, a, b))  # doctest: +SKIP
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.graph = node.graph
        self.called: list[Any] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call `target` on nodes and constants."""
        self.called.append(target)
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = tree_map(value, (args, kwargs))
        new.meta = {k: self.node.meta[k] for k in _KEPT if k in self.node.meta}
        with _fake_mode(fake_args, fake_kwargs):
            new.meta["val"] = _FAKES.get(target, target)(*fake_args, **fake_kwargs)
        return new

    def take_place(self, new: Node | tuple[Node | None, ...]) -> None:
        """Let the users of the node use `new` instead; a tuple stands for several outputs."""
        if isinstance(new, tuple):
            for user in list(self.node.users):
                output = new[user.args[1]]  # type: ignore[index]
                if output is not None:
                    carry_origins(output, user)
                    user.replace_all_uses_with(output)
                    self.graph.erase_node(user)
        else:
            self.node.replace_all_uses_with(new)
        self.graph.erase_node(self.node)


def _fake_mode(*values: Any) -> Any:
    mode = torch._guards.detect_fake_mode(values)
    return mode if mode is not None else torch.no_grad()
