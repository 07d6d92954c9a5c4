"""Follows the rows of the batch through a graph, node by node, with the rules of `rules.TABLE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from bicompile import graph
from bicompile.independence.axes import (
    MIXES,
    UNDECIDED,
    Factor,
    Poison,
    Stop,
    Tag,
    Value,
    equal,
    plain,
)

_EFFECTLESS = ("_assert", "sym_constrain", "_functional_assert", "_functional_sym_constrain")
_SIZES = ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "sym_is_contiguous")
_READ_OUT = ("_local_scalar_dense", "item")
_ARITHMETIC = ("_operator", "operator", "math", "torch", "builtins", "torch.utils._sympy.functions")


def expression(size: Any) -> Any:
    """A size as a sympy expression; what is no size is returned as it is."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size.node.expr
    if isinstance(size, int) and not isinstance(size, bool):
        return sympy.Integer(size)
    return size


def shape_of(tensor: torch.Tensor) -> list[Any]:
    """The sizes of a fake tensor as sympy expressions."""
    return [expression(s) for s in tensor.shape]


def poison_at(node: Node, verdict: str, reason: str) -> Poison:
    """What is known of a node that a rule stops at."""
    target = node.target
    name = str(target) if isinstance(target, torch._ops.OpOverload) else None
    name = name or getattr(target, "__name__", str(target))
    return Poison(verdict, f"{name}: {reason}", node.name, graph.user_line(node))


@dataclass(frozen=True)
class Call:
    """One call of an op: its arguments by their names in the schema, nodes replaced by values."""

    node: Node
    batch: frozenset[sympy.Symbol]
    given: Mapping[str, Any]
    shapes: Sequence[Sequence[Any]]
    dtypes: Sequence[torch.dtype]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or a default if the op has none of that name."""
        return self.given.get(name, default)

    @property
    def name(self) -> str:
        """Name of the op without its namespace."""
        return str(self.node.target._schema.name.split("::")[1])  # type: ignore[union-attr]

    @property
    def overload(self) -> str:
        """Name of the overload."""
        return str(self.node.target._overloadname)  # type: ignore[union-attr]

    @property
    def tensors(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return [v for v in leaves(list(self.given.values())) if isinstance(v, Value)]

    @property
    def shape(self) -> Sequence[Any]:
        """The sizes of the first result."""
        return self.shapes[0]

    def poison(self, verdict: str, reason: str) -> Poison:
        """What is known of a node that this call stops at."""
        return poison_at(self.node, verdict, reason)

    def as_numbers(self) -> Call:
        """The same call with tensors as ordinary numbers, whatever is known of their meaning."""
        return replace(self, given={k: _as_numbers(v) for k, v in self.given.items()})

    def as_numbers_but(self, name: str) -> Call:
        """The same, but for one argument."""
        given = {k: v if k == name else _as_numbers(v) for k, v in self.given.items()}
        return replace(self, given=given)

    def depends(self, size: Any) -> bool:
        """Whether a number depends on the batch size."""
        return isinstance(size, sympy.Expr) and not self.batch.isdisjoint(size.free_symbols)

    def refuse_batch_size(self, *numbers: Any) -> None:
        """Stop where the batch size is used as a number."""
        if any(self.depends(n) for n in leaves(list(numbers))):
            raise Stop(UNDECIDED, "the batch size is used as a number")

    def combined(self, *axes: Sequence[Factor], how: str) -> None:
        """Stop unless all elements along the axes may be combined."""
        for f in (f for axis in axes for f in axis):
            if f.order is not None:
                raise Stop(MIXES, "", f.order.poison)
            if f.tag is Tag.ROW:
                raise Stop(MIXES, f"it {how} the rows of the batch")
            if self.depends(f.size):
                raise Stop(UNDECIDED, f"it {how} an axis whose size depends on the batch size")

    def no_rows(self, *axes: Sequence[Factor], reason: str) -> None:
        """Stop if one of the axes holds rows, or as many elements as there are rows."""
        for f in (f for axis in axes for f in axis):
            if f.order is not None:
                raise Stop(MIXES, "", f.order.poison)
            if f.fixed or self.depends(f.size):
                raise Stop(UNDECIDED, reason)

    def not_by_size(self, axis: Sequence[Factor]) -> None:
        """Stop if what stands at a given place of the axis may depend on the batch size."""
        if any(f.tag is Tag.PLAIN and self.depends(f.size) for f in axis):
            raise Stop(UNDECIDED, "what it takes may depend on the batch size")


def leaves(x: Any) -> Iterator[Any]:
    """The leaves of nested lists and tuples."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from leaves(item)
    else:
        yield x


def _as_numbers(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return [_as_numbers(v) for v in given]
    if not isinstance(given, Value) or given.content is None:
        return given
    if given.content.poison is not None:
        raise Stop("", "", given.content.poison)
    return Value(given.axes)


class Walk:
    """What is known of every node of a graph."""

    def __init__(self, gm: GraphModule, batch: frozenset[sympy.Symbol]) -> None:
        self.gm, self.batch = gm, batch
        self.env: dict[Node, Any] = {}
        self.written: dict[str, Any] = {}
        self.spoiled: Poison | None = None
        self.results: list[Any] = []

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Follow the inputs to the results, in the order of the output node."""
        given = iter(inputs)
        result: Any = []
        for node in self.gm.graph.nodes:
            if node.op == "output":
                (result,) = map_arg(node.args, self._value)
            else:
                self.env[node] = self._poisoned_or(node, given)
        self.results = list(result) if isinstance(result, (list, tuple)) else [result]
        return self.results

    def _poisoned_or(self, node: Node, given: Iterator[Any]) -> Any:
        try:
            if node.op == "placeholder":
                return next(given)
            if self.spoiled is not None:
                return self.spoiled
            if node.op == "get_attr":
                return self._attribute(node)
            if node.op != "call_function":
                raise Stop(UNDECIDED, f"a {node.op} is not followed")
            return self._call(node)
        except Stop as stop:
            return stop.poison or poison_at(node, stop.verdict, stop.reason)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            return poison_at(node, UNDECIDED, f"its call cannot be followed ({error!r})")

    def _attribute(self, node: Node) -> Any:
        found: Any = self.gm
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if isinstance(found, torch.Tensor):
            return Value(tuple(plain(s) for s in shape_of(found)))
        return found

    def _value(self, node: Node) -> Any:
        return self.spoiled or self.env[node]

    def _call(self, node: Node) -> Any:
        target = node.target
        if target is getitem:
            source = self.env[node.args[0]]  # type: ignore[index]
            return source if isinstance(source, Poison) else source[node.args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._nested(node)
        if not isinstance(target, torch._ops.OpOverload):
            return self._number(node)
        name = target._schema.name.split("::")[1]
        if name.startswith(_EFFECTLESS):
            return None
        if name in _SIZES:
            return self._size(node)
        if name in _READ_OUT:
            return self._read_out(node)
        if target._schema.is_mutable:
            return self._write(node)
        return self._op(node)

    # ------------------------------------------------------------------------------- numbers

    def _size(self, node: Node) -> Any:
        val = expression(node.meta["val"])
        symbols = getattr(val, "free_symbols", ())
        if isinstance(found := self.env[node.all_input_nodes[0]], Poison) and any(
            s.name.startswith("u") for s in symbols
        ):
            return found
        return val

    def _read_out(self, node: Node) -> Any:
        (value,) = (self.env[n] for n in node.all_input_nodes)
        if isinstance(value, Poison):
            return value
        if value.content is not None and value.content.poison:
            raise Stop("", "", value.content.poison)
        if value.fixed:
            raise Stop(MIXES, "one number is read from the rows for all of them")
        return expression(node.meta["val"])

    def _number(self, node: Node) -> Any:
        if getattr(node.target, "__module__", "") not in _ARITHMETIC:
            raise Stop(UNDECIDED, "no rule is known for it")
        for value in (self.env[n] for n in node.all_input_nodes):
            if isinstance(value, Poison):
                return value
            if isinstance(value, (Value, tuple, list)):
                raise Stop(UNDECIDED, "no rule is known for it")
        return expression(node.meta["val"])

    # ----------------------------------------------------------------------------------- ops

    def _op(self, node: Node) -> Any:
        from bicompile.independence.rules import FROM_SHAPES, TABLE

        target: Any = node.target
        entry = TABLE.get(target._schema.name)
        if entry is None:
            raise Stop(UNDECIDED, "no rule is known for it")
        given = self._bound(node)
        shapes_only = target._schema.name in FROM_SHAPES
        read = [v for k, v in given.items() if not (shapes_only and k == "self")]
        poisons = [v for v in leaves(read) if isinstance(v, Poison)]
        if poisons:
            return min(poisons, key=lambda p: p.verdict != MIXES)
        vals = node.meta["val"]
        several = isinstance(vals, (list, tuple))
        tensors = [v for v in leaves(vals) if isinstance(v, torch.Tensor)]
        shapes, dtypes = [shape_of(v) for v in tensors], [v.dtype for v in tensors]
        call = Call(node, self.batch, given, shapes, dtypes)
        if not entry.keeps:
            call = call.as_numbers()
        if not (entry.keeps or entry.sized):
            call.refuse_batch_size(*call.given.values())
        found = entry.rule(call)
        results = list(found) if isinstance(found, (list, tuple)) else [found] * len(shapes)
        for result, shape in zip(results, shapes, strict=True):
            self._check(result, shape)
        rest = iter(results)
        filled = [next(rest) if isinstance(v, torch.Tensor) else v for v in leaves(vals)]
        return tuple(filled) if several else filled[0]

    def _bound(self, node: Node) -> dict[str, Any]:
        schema: Any = node.target._schema  # type: ignore[union-attr]
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.env[n])
        given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
        return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}

    def _check(self, result: Value, shape: Sequence[Any]) -> None:
        if result.rank != len(shape) or not all(map(equal, result.shape, shape)):
            raise Stop(UNDECIDED, "its sizes cannot be followed")
        if len(result.fixed) > 1:
            for f in result.fixed:
                if f.order is not None:
                    raise Stop("", "", f.order.poison)
            raise Stop(MIXES, "every row meets every other row")

    # -------------------------------------------------------------------------------- others

    def _write(self, node: Node) -> Any:
        """AOTAutograd's writes to inputs come last; any other write hides what is read later."""
        destination, source = node.args[:2]
        later = node.next
        while later.target is node.target:
            later = later.next
        plain_copy = node.target is torch.ops.aten.copy_.default and later.op == "output"
        if not (plain_copy and isinstance(destination, Node) and destination.op == "placeholder"):
            self.spoiled = poison_at(node, UNDECIDED, "it changes a tensor in place")
            return self.spoiled
        self.written[destination.name] = self._value(source)  # type: ignore[arg-type]
        return self.written[destination.name]

    def _nested(self, node: Node) -> Any:
        """A subgraph that is called once, with the same sizes inside as outside."""
        name = str(getattr(node.target, "__name__", node.target))
        args = [self.env[a] if isinstance(a, Node) else a for a in node.args]
        found = [i for i, a in enumerate(args) if isinstance(a, GraphModule)]
        if name not in ("invoke_subgraph", "wrap_with_set_grad_enabled", "wrap_with_autocast"):
            raise Stop(UNDECIDED, "no rule is known for it")
        position = found[0]
        inputs = args[position + (2 if name == "invoke_subgraph" else 1) :]
        inside = Walk(args[position], self.batch)  # type: ignore[arg-type]
        holes = [n for n in inside.gm.graph.nodes if n.op == "placeholder"]
        for value, hole in zip(inputs, holes, strict=True):
            val = hole.meta.get("val")
            if isinstance(value, Value) and isinstance(val, torch.Tensor):
                self._check_same(value, shape_of(val))
        results = inside.run(inputs)
        if inside.written:
            raise Stop(UNDECIDED, "it changes a tensor in place")
        return tuple(results)

    def _check_same(self, value: Value, shape: Sequence[Any]) -> None:
        if value.rank != len(shape) or not all(map(equal, value.shape, shape)):
            raise Stop(UNDECIDED, "its sizes inside are not those outside")
