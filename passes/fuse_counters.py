"""Counters that advance by the same number do so together; no bit changes.

A static cache of transformers counts the tokens of each layer.  Before::

    %a = aten.add.Tensor(%n1, 1)
    %b = aten.add.Tensor(%n2, 1)
    %c = aten.copy_.default(%n1, %a)
    %d = aten.copy_.default(%n2, %b)

becomes::

    %l = aten._foreach_add.Scalar([%n1, %n2], 1)
    %a = getitem(%l, 0)
    %b = getitem(%l, 1)
    %c = aten.copy_.default(%n1, %a)
    %d = aten.copy_.default(%n2, %b)

because on a GPU each is a kernel of its own, one after the other at the end of a step.
"""

from __future__ import annotations

from collections import defaultdict
from operator import getitem

import torch
from torch.fx import GraphModule, Node

from bicompile.graph import Emit, value

aten = torch.ops.aten
_ADD = (aten.add.Tensor, aten.add.Scalar)


def fuse_counters(gm: GraphModule, *, run) -> None:
    """Add the same number to all counters in one call."""
    alike: dict[object, list[Node]] = defaultdict(list)
    for copy in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        if _advances(copy):
            counter, step = value(copy.args[0]), copy.args[1].args[1]
            alike[counter.dtype, counter.device, step].append(copy)
    for copies in alike.values():
        if len(copies) < 2 or not run.fuel():
            continue
        emit = Emit(copies[0])
        counters = [copy.args[0] for copy in copies]
        together = emit(aten._foreach_add.Scalar, counters, copies[0].args[1].args[1])
        for i, copy in enumerate(copies):
            add = copy.args[1]
            run.decide(add, "counters advance together", became=str(aten._foreach_add.Scalar))
            new = emit(getitem, together, i)
            new.meta = {**add.meta}
            copy.replace_input_with(add, new)
            gm.graph.erase_node(add)


def _advances(copy: Node) -> bool:
    """Whether a whole number goes up by a constant, and nothing else reads what it goes up to."""
    counter, add = copy.args[:2]
    return (
        isinstance(add, Node)
        and add.target in _ADD
        and add.args[0] is counter
        and isinstance(add.args[1], int)
        and not add.kwargs
        and list(add.users) == [copy]
        and value(counter).dim() == 0
        and value(counter).dtype in (torch.int32, torch.int64)
    )
