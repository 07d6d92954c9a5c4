"""Repeated layers become calls of one subgraph, which Inductor compiles once.

Before::

    %a1 = bicompile.mm.default(%x, %w1)
    %y1 = aten.relu.default(%a1)
    %c1 = aten.index_put.default(%cache1, [%i], %y1)
    %a2 = bicompile.mm.default(%y1, %w2)
    %y2 = aten.relu.default(%a2)
    %c2 = aten.index_put.default(%cache2, [%i], %y2)

becomes, with ``layer(x, w) = relu(mm(x, w))``::

    %r1 = invoke_subgraph(%layer, "layer", %x, %w1)
    %y1 = getitem(%r1, 0)
    %c1 = aten.index_put.default(%cache1, [%i], %y1)
    %r2 = invoke_subgraph(%layer, "layer", %y1, %w2)
    ...

because most of the time to the first answer is Inductor's, and it works on every layer anew.  No
bit changes: each op rounds to its dtype whatever is fused with it.

Writes stay outside, or Inductor would copy what it now writes in place (a cache); so does what has
another effect.  Views at the end of a layer are taken outside, of the tensor that they view:
Inductor counts the offset of a returned view twice.  So are integers that follow from inputs alone,
the positions and the length of a cache: as results of a layer they would be kernels of their own,
outside they are part of the write that reads them.  Only inference graphs are changed: in training
Inductor 2.13 computes wrong gradients through subgraphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from bicompile.graph import carry_origins

aten = torch.ops.aten
_INVOKE = torch.ops.higher_order.invoke_subgraph
# Inductor does these in place where the tensor is not read again, which it sees in one graph only.
_WRITES = frozenset(("index_put", "_unsafe_index_put", "index_copy", "slice_scatter", "scatter"))
_SMALLEST = 8  # nodes of a layer that is worth a call
_NAME = "repeated_layer"


@dataclass(frozen=True)
class _Region:
    """One occurrence of a layer: its nodes, and what others read of it.

    `again` are the nodes that others read and that are repeated behind the call.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    again: tuple[Node, ...]
    structure: tuple[object, ...]

    def needed(self) -> tuple[Node, ...]:
        """The nodes that are computed in the layer."""
        found = set(self.outputs)
        for node in reversed(self.nodes):
            if node in found:
                found.update(node.all_input_nodes)
        return tuple(n for n in self.nodes if n in found)


def deduplicate(gm: GraphModule, *, run) -> None:
    """Lift the longest run of equal layers into one subgraph."""
    if not run.inference or any(n.target is _INVOKE for n in gm.graph.nodes):
        return
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    regions = [_region(stretch) for stretch in _stretches(nodes)]
    structures = Counter(r.structure for r in regions)
    common, count = max(structures.items(), key=lambda item: item[1], default=(None, 0))
    regions = [r for r in regions if r.structure == common]
    if count < 2 or not _may_be_called(regions[0]) or not run.fuel():
        return
    layer = _subgraph(gm, regions)
    gm.add_submodule(_NAME, layer)
    for region in regions:
        run.decide(region.nodes[0], f"layer of {len(region.nodes)} nodes", became=_NAME)
        _call(gm.graph, region)


def _stretches(nodes: Sequence[Node]) -> list[Sequence[Node]]:
    """Where a layer may stand: pieces of one period each, between the nodes that stay outside."""
    kinds: dict[object, int] = {}
    sequence = [kinds.setdefault(_kind(n), len(kinds)) for n in nodes]
    start, period, end = _longest_period(sequence)
    if period == 0:
        return []
    outside = [i for i in range(period) if _stays_outside(nodes[start + i])]
    first, length = 0, period
    if outside:
        gaps = [
            ((b - a - 1), a + 1)
            for a, b in zip(outside, [*outside[1:], outside[0] + period], strict=True)
        ]
        length, first = max(gaps)
    if length < _SMALLEST:
        return []
    places = range(start + first, end - length + 1, period)
    return [nodes[i : i + length] for i in places]


def _longest_period(sequence: Sequence[int]) -> tuple[int, int, int]:
    """(start, period, end) of the longest stretch in which everything recurs after `period`."""
    best = (0, 0, 0)
    longest = 0
    for period in range(_SMALLEST, len(sequence) // 2 + 1):
        run = 0
        for i in range(len(sequence) - period):
            run = run + 1 if sequence[i] == sequence[i + period] else 0
            if run > longest and run >= period:
                longest, best = run, (i - run + 1, period, i + period + 1)
    return best


def _kind(node: Node) -> object:
    """What must agree for two nodes to be the same step of two layers."""
    literals = map_arg((node.args, node.kwargs), lambda _: "*")
    return str(node.target), repr(literals), _described(node)


def _described(node: Node) -> object:
    """Dtype, sizes, strides and place of what a node holds."""
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else (val,)
    return tuple(
        (v.dtype, str(v.shape), str(v.stride()), str(v.storage_offset()), v.device)
        if isinstance(v, torch.Tensor)
        else str(v)
        for v in values
    )


def _stays_outside(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is not getitem
    name = target._schema.name.split("::")[1]
    return target._schema.is_mutable or node.is_impure() or name in _WRITES


def _region(nodes: Sequence[Node]) -> _Region:
    inside = {n: i for i, n in enumerate(nodes)}
    inputs = _inputs(nodes)
    numbers = {n: -1 - i for i, n in enumerate(inputs)} | inside
    wires = tuple(numbers[a] for n in nodes for a in _arguments(n))
    outputs, again = _read_outside(nodes, inside)
    described = tuple((n.op == "get_attr", _described(n)) for n in inputs)
    places = tuple(inside[n] for n in outputs), tuple(inside[n] for n in again)
    structure = tuple(map(_kind, nodes)), wires, described, places
    return _Region(tuple(nodes), outputs, again, structure)


def _arguments(node: Node) -> list[Node]:
    """The nodes that a node reads, as often as it reads them."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _inputs(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """What a region reads, in the order of its first use.

    Asked anew for each call: what an earlier call replaced is read from there.
    """
    inside = set(nodes)
    return tuple(dict.fromkeys(a for n in nodes for a in _arguments(n) if a not in inside))


def _read_outside(
    nodes: Sequence[Node], inside: Container[Node]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """What others read of a region: what it computes, and what is repeated outside to be read."""
    outputs, again = set(), set()
    for node in nodes:
        if all(u in inside for u in node.users):
            continue
        while node in inside and _is_view(node):
            again.add(node)
            node, *sizes = node.all_input_nodes
            outputs.update(n for n in sizes if n in inside)
        integers = _integers(node, inside)
        again.update(integers or ())
        if integers is None:
            outputs.add(node)
    return tuple(n for n in nodes if n in outputs), tuple(n for n in nodes if n in again)


def _integers(node: Node, inside: Container[Node]) -> set[Node] | None:
    """The nodes from a region's inputs to integers that follow from them alone, element by element.

    None if the region has to compute it.
    """
    if node not in inside:
        return set()
    val, tags = node.meta.get("val"), getattr(node.target, "tags", ())
    whole = isinstance(val, torch.Tensor) and val.dtype in (torch.int32, torch.int64)
    random = torch.Tag.nondeterministic_seeded in tags
    simple = torch.Tag.pointwise in tags or not node.all_input_nodes or _is_view(node)
    if not whole or not simple or random:
        return None
    found = {node}
    for read in node.all_input_nodes:
        before = _integers(read, inside)
        if before is None:
            return None
        found |= before
    return found


def _is_view(node: Node) -> bool:
    if node.target is getitem:
        return _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.split("::")[1]
    aliases = any(r.alias_info is not None for r in node.target._schema.returns)
    return aliases or name in ("_unsafe_view", "reshape", "contiguous")


def _may_be_called(region: _Region) -> bool:
    """A subgraph takes tensors and sizes, and returns tensors, no parts of wider ones (cat)."""
    taken = [n.meta.get("val") for n in _inputs(region.needed())]
    takes = all(isinstance(v, (torch.Tensor, int, torch.SymInt)) for v in taken)
    tensors = all(isinstance(n.meta["val"], torch.Tensor) for n in region.outputs)
    parts = any(u.target is aten.cat.default for n in region.outputs for u in n.users)
    return bool(region.outputs) and takes and _knows_its_sizes(taken) and tensors and not parts


def _knows_its_sizes(taken: Sequence[object]) -> bool:
    """Whether what varies in a size that is computed, as 2 * n, is a size itself, n."""
    sizes: list[object] = []
    for v in taken:
        sizes += [*v.shape, *v.stride()] if isinstance(v, torch.Tensor) else [v]
    computed = [n.node.expr for n in sizes if isinstance(n, torch.SymInt)]
    known = {e for e in computed if e.is_Symbol}
    return all(e.free_symbols <= known for e in computed)


def _subgraph(gm: GraphModule, regions: Sequence[_Region]) -> GraphModule:
    """The first region as a graph; each node stands for its fellows in all regions."""
    graph, copies, region = Graph(), {}, regions[0]
    for i, node in enumerate(_inputs(region.needed())):
        copies[node] = graph.placeholder(f"input_{i}")
        copies[node].meta["val"] = node.meta["val"]
    for same in zip(*(r.needed() for r in regions), strict=True):
        copies[same[0]] = graph.node_copy(same[0], copies.__getitem__)
        carry_origins(copies[same[0]], *same)
    outputs = tuple(copies[n] for n in region.outputs)
    graph.output(outputs).meta["val"] = tuple(n.meta["val"] for n in outputs)
    return GraphModule(gm, graph)


def _call(graph: Graph, region: _Region) -> None:
    """Put a call in the place of a region, which is erased."""
    inputs = _inputs(region.needed())
    with graph.inserting_before(region.nodes[-1].next):
        layer = graph.get_attr(_NAME)
        call = graph.call_function(_INVOKE, (layer, _NAME, *inputs))
        call.meta["val"] = tuple(n.meta["val"] for n in region.outputs)
        copies = {}
        for number, node in enumerate(region.outputs):
            copies[node] = graph.call_function(getitem, (call, number))
        for node in region.again:
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
    for node, new in copies.items():
        new.meta = {**node.meta}
        node.replace_all_uses_with(new)
    for node in reversed(region.nodes):
        graph.erase_node(node)
