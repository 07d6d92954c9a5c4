"""Finds the first operation at which one row gets other bits in two runs of a model.

The model is traced once for each of the two inputs (`bicompile.independence.trace`).  Where a row
lies in every intermediate value is known from the proof of independence, also where it is folded
into a larger axis, so that values of batches of different sizes can be compared.

What is compared is what the programs themselves computed: the traced graph, with nodes of interest
as further results, is run by eager PyTorch node by node, or compiled.  Further results may change
what a compiler fuses, and with it the bits; so the results of the instrumented graph are compared
with those of the model as it is, and `Difference.faithful` says whether every bit was the same.
All nodes are asked for at once; if that is not faithful, some are, in rounds, until one is left.
The node that is named is the first in the order of the graph, so that what it reads has equal bits;
after rounds, the first of those that reach a watched node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_leaves

from bicompile import graph, independence
from bicompile.errors import GraphBreak, UnsafeSetting
from bicompile.independence.axes import Value
from bicompile.independence.trace import BatchAxes, Traced, trace
from bicompile.independence.walk import shape_of
from bicompile.instrumented import Watcher, compiled, with_results
from bicompile.testing import bits, pattern, ulps

Program = str | Callable[[GraphModule], Callable[..., Any]]
PROGRAMS = ("eager", "inductor", "bicompile")
_PROBES = 32  # nodes asked for in one round


@dataclass(frozen=True)
class Difference:
    """The first node at which the row's bits differ.

    Args:
        node: its name in the traced graph.
        target: the op.
        module: the module it is in, as ``layers.7.down_proj``; empty outside of any.
        line: the user's source line, if known.
        index: the element of the row, by the sizes of the row's part of the value.
        values: that element in the two runs.
        patterns: its bits in hex.
        ulps: how many representable numbers lie between the two.
        count: how many elements of the row differ, of how many.
        step: the number of the call in a loop, from 0.
        faithful: for each run, whether the results had the same bits without instrumentation.
    """

    node: str
    target: str
    module: str
    line: str | None
    index: tuple[int, ...]
    values: tuple[float, float]
    patterns: tuple[str, str]
    ulps: int
    count: tuple[int, int]
    step: int = 0
    faithful: tuple[bool, bool] = (True, True)

    def __str__(self) -> str:
        place = [f"step {self.step}", self.module, f"{self.node} ({self.target})"]
        lines = [
            "first difference: " + ", ".join(p for p in place if p),
            f"  at: {self.line or 'unknown'}",
            f"  element {[*self.index]}: {self.values[0]:.9g} ({self.patterns[0]}) and "
            f"{self.values[1]:.9g} ({self.patterns[1]}), {self.ulps} ulp apart",
            f"  {self.count[0]} of {self.count[1]} elements of the row differ there",
        ]
        for name, faithful in zip(("first", "other"), self.faithful, strict=True):
            if not faithful:
                lines.append(f"  watching changed the bits of the {name} program's results")
        return "\n".join(lines)


def bisect(
    model: torch.nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    other_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    row: int = 0,
    other_row: int | None = None,
    program: Program = "eager",
    other_program: Program | None = None,
    batch: BatchAxes = None,
    padding: str = "left",
    steps: int = 1,
    advance: Callable[[Any, Any], Any] | None = None,
) -> Difference | None:
    """Run a model twice and name the first node at which the bits of one row differ.

    Compiled functions of this process are forgotten (`torch.compiler.reset`), so that each batch
    size is compiled as if it were the first.

    Args:
        model: a module; its mode is kept.
        inputs: positional inputs, or inputs by name, of the first run.
        other_inputs: those of the other run; by default the same.
        row: the row in the first run.
        other_row: the same row in the other run; by default at the same place.
        program: what runs the model: "eager", "inductor" (default torch.compile), "bicompile", or a
            function from a graph of aten ops to what runs it.
        other_program: of the other run; by default the same.
        batch: as in `bicompile.independence.prove_model`.
        padding: where the longer of the two has its padding; what both have is compared, from the
            end ("left") or from the start ("right").
        steps: how many calls to make, each with the inputs that `advance` gives.
        advance: from a call's inputs and results to the inputs of the next, as in decoding.  The
            results hold what is carried over (caches), so that they are compared.

    Returns:
        the difference, or None if all results of all steps have the same bits.

    Raises:
        GraphBreak: the model cannot be traced with a batch of any size.
        UnsafeSetting: the two inputs lead to graphs of different ops, or an argument is wrong.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> x = torch.randn(3, 8)
        >>> print(bisect(model, [x], [x.clone()]))
        None
    """
    if padding not in ("left", "right"):
        raise _wrong("padding", padding, "it is neither of the two", ["left", "right"])
    other_inputs = inputs if other_inputs is None else other_inputs
    other_program = program if other_program is None else other_program
    other_row = row if other_row is None else other_row
    graphs = _Graphs(model, batch)
    with torch.no_grad():
        for step in range(steps):
            first = Side(graphs, inputs, program, row)
            other = Side(graphs, other_inputs, other_program, other_row)
            found = Search(first, other, padding).run()
            if found is not None:
                return replace(found, step=step)
            if advance is not None and step + 1 < steps:
                inputs = advance(inputs, first.results)
                other_inputs = advance(other_inputs, other.results)
    return None


def _wrong(setting: str, value: Any, reason: str, accepted: Sequence[str]) -> UnsafeSetting:
    return UnsafeSetting(
        setting=setting, value=value, reason=reason, accepted=accepted, todo=f"correct {setting}"
    )


@dataclass(frozen=True)
class _Graph:
    """A traced model, its nodes that compute something, and where the rows lie in each."""

    traced: Traced
    nodes: Sequence[Node]
    known: Mapping[Node, Any]
    symbols: frozenset[Any]


class _Graphs:
    """The graphs of a model, one for all inputs of the same sizes."""

    def __init__(self, model: torch.nn.Module, batch: BatchAxes) -> None:
        self.model, self.batch = model, batch
        self.kept: dict[str, _Graph] = {}

    def get(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Graph:
        """Trace the model, if it was not yet for such inputs."""
        leaves, spec = tree_flatten((args, kwargs))
        key = f"{spec} {[graph.describe(x) for x in leaves]}"
        if key not in self.kept:
            self.kept[key] = self._trace(args, kwargs)
        return self.kept[key]

    def _trace(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Graph:
        try:
            traced = trace(self.model, args, kwargs, self.batch)
        except Exception as error:  # whatever a model may raise while it is traced
            first = str(error).strip().partition("\n")[0] or repr(error)
            raise GraphBreak(reason=first) from error
        walk = independence.follow(traced.gm, traced.batch)
        if isinstance(walk, str):
            raise GraphBreak(reason=walk)
        nodes = [n for n in traced.gm.graph.nodes if n.op == "call_function"]
        return _Graph(traced, nodes, walk.env, walk.batch)


class Side:
    """One of the two runs: a model, its inputs, what runs it, and where the row lies."""

    def __init__(self, graphs: _Graphs, inputs: Any, program: Program, row: int) -> None:
        if isinstance(program, str) and program not in PROGRAMS:
            raise _wrong("program", program, "there is no such program", PROGRAMS)
        named = isinstance(inputs, Mapping)
        self.args: Sequence[Any] = () if named else tuple(inputs)
        self.kwargs: Mapping[str, Any] = dict(inputs) if named else {}
        self.model, self.program, self.row = graphs.model, program, row
        self.graph = graphs.get(self.args, self.kwargs)
        self.gm, self.nodes = self.graph.traced.gm, self.graph.nodes
        self.arguments = self.graph.traced.arguments(self.args, self.kwargs)
        self.rows = self._rows()

    def _rows(self) -> int:
        """The batch size."""
        axes, holes = self.graph.traced.batch, self.gm.graph.find_nodes(op="placeholder")
        given = zip(holes, self.arguments, strict=True)
        sizes = {x.shape[axes[n.name]] for n, x in given if n.name in axes}
        if len(sizes) != 1 or not 0 <= self.row < max(sizes):
            reason = f"the inputs have {' or '.join(map(str, sorted(sizes)))} rows"
            raise _wrong("row", self.row, reason, ["the number of a row"])
        return int(sizes.pop())

    @cached_property
    def results(self) -> Any:
        """What the model returns, run by the program as it is."""
        if callable(self.program):
            return self.program(self.gm)(*self.arguments)
        return compiled(self.model, self.program)(*self.args, **self.kwargs)

    def part(self, node: Node, value: torch.Tensor) -> torch.Tensor | None:
        """The row's part of a node's value; None where it is not known."""
        known = self.graph.known.get(node)
        if isinstance(known, Value):
            if known.content is not None and known.content.poison is not None:
                return None  # the rows' own numbers
            if any(f.order is not None for f in known.fixed):
                return None
            symbols = self.graph.symbols
            factors = [(f.size, f.size in symbols) for axis in known.axes for f in axis]
        else:  # rows mix here: the row is taken to lie where the batch does
            sizes = shape_of(node.meta["val"])
            factors = [(size, size in self.graph.symbols) for size in sizes]
        rows = dict.fromkeys(self.graph.symbols, self.rows)
        value = value.reshape([int(size.subs(rows)) for size, _ in factors])
        at = [i for i, (_, holds_rows) in enumerate(factors) if holds_rows]
        if not at and any(size.free_symbols for size, _ in factors):
            return None
        return value.select(at[0], self.row) if at else value

    def watch(self, nodes: Sequence[Node]) -> tuple[dict[Node, torch.Tensor], list[torch.Tensor]]:
        """Values of some nodes, and the results of the same run."""
        if self.program == "eager":
            wanted = set(nodes)
            watcher = Watcher(self.gm, wanted)
            results = watcher.run(*self.arguments)
            return watcher.seen, _tensors(results)
        gm = with_results(self.gm, nodes)
        run = self.program(gm) if callable(self.program) else compiled(gm, self.program)
        seen, results = run(*self.arguments)
        return dict(zip(nodes, seen, strict=True)), _tensors(results)

    def faithful(self, results: Sequence[torch.Tensor]) -> bool:
        """Whether results have the bits of the model as it is."""
        if not callable(self.program):  # what is written to buffers comes before the results
            results = results[len(results) - len(_tensors(self.results)) :]
        return _same(results, self.results)


def _same(results: Sequence[torch.Tensor], expected: Any) -> bool:
    given = _tensors(expected)
    return len(given) == len(results) and all(
        a.shape == b.shape and bool((bits(a) == bits(b)).all())
        for a, b in zip(results, given, strict=True)
    )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Search:
    """Compares the nodes of two sides in their order."""

    def __init__(self, first: Side, other: Side, padding: str) -> None:
        self.first, self.other, self.padding = first, other, padding
        if [n.target for n in first.nodes] != [n.target for n in other.nodes]:
            reason = "they lead to graphs of different ops"
            raise _wrong("other_inputs", "given", reason, ["inputs that take the same way"])
        self.pairs = [
            (a, b)
            for a, b in zip(first.nodes, other.nodes, strict=True)
            if isinstance(a.meta.get("val"), torch.Tensor)
        ]

    def run(self) -> Difference | None:
        """The first difference, or None if the results have the same bits."""
        if not self._results_differ():
            return None
        found, faithful = self._among(self.pairs)
        if all(faithful) or found is None:
            return found
        return self._in_rounds() or found

    def _results_differ(self) -> bool:
        sides = (self.first, self.other)
        values = [_tensors(s.results) for s in sides]
        nodes = [tree_leaves(s.gm.graph.output_node().args) for s in sides]
        nodes = [[n for n in ns if isinstance(n, Node)] for ns in nodes]
        # Buffers that the model writes come before its results.
        nodes = [n[len(n) - len(v) :] for n, v in zip(nodes, values, strict=True)]
        return any(
            self._compare(a, b, x, y) is not None
            for a, b, x, y in zip(*nodes, *values, strict=True)
        )

    def _among(
        self, pairs: Sequence[tuple[Node, Node]]
    ) -> tuple[Difference | None, tuple[bool, bool]]:
        """The first of some nodes that differs, and whether watching them changed no bit."""
        lefts, rights = zip(*pairs, strict=True)
        first, first_results = self.first.watch(lefts)
        other, other_results = self.other.watch(rights)
        faithful = self.first.faithful(first_results), self.other.faithful(other_results)
        for a, b in pairs:
            found = self._compare(a, b, first[a], other[b])
            if found is not None:
                return replace(found, faithful=faithful), faithful
        return None, faithful

    def _in_rounds(self) -> Difference | None:
        """Watch few nodes at a time, evenly spread over where the first difference may be."""
        low, high = 0, len(self.pairs)
        found = None
        while low < high:
            step = max(1, (high - low) // _PROBES)
            chosen = list(range(low + step - 1, high, step))
            candidate, _ = self._among([self.pairs[i] for i in chosen])
            if candidate is None:
                low = chosen[-1] + 1
                continue
            found = candidate
            at = next(i for i in chosen if self.pairs[i][0].name == candidate.node)
            low, high = max(low, at - step + 1), at
            if step == 1:
                break
        return found

    def _compare(self, a: Node, b: Node, x: torch.Tensor, y: torch.Tensor) -> Difference | None:
        left, right = self.first.part(a, x), self.other.part(b, y)
        if left is None or right is None:
            return None
        left, right = self._aligned(left, right)
        different = (bits(left) != bits(right)).nonzero()
        if not len(different):
            return None
        index = tuple(different[0].tolist())
        pair = left[index], right[index]
        stack = a.meta.get("nn_module_stack") or {}
        modules = [path for path, _ in stack.values()]
        return Difference(
            node=a.name,
            target=str(a.target),
            module=modules[-1].removeprefix("model").lstrip(".") if modules else "",
            line=graph.user_line(a),
            index=index,
            values=(pair[0].item(), pair[1].item()),
            patterns=(pattern(pair[0]), pattern(pair[1])),
            ulps=ulps(*pair),
            count=(len(different), left.numel()),
        )

    def _aligned(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What both have, where one is longer by its padding."""
        for d in range(x.dim()):
            size = min(x.shape[d], y.shape[d])
            x, y = (
                t.narrow(d, t.shape[d] - size if self.padding == "left" else 0, size)
                for t in (x, y)
            )
        return x, y
