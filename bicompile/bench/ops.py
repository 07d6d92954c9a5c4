"""Single ops at the sizes of a model; the group's name holds the sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from bicompile.bench import timing
from bicompile.bench.cases import Case, System
from bicompile.bench.systems import copy, dtype_named, under

Inputs = list[torch.Tensor]


class OpWork:
    """One op at a time, in all batch sizes of its group."""

    def __init__(self, system: System, device: str, dtype: str, rows: Mapping[str, int]) -> None:
        self.system = system
        self.device = device
        self.dtype = dtype_named(dtype)
        self.rows = rows
        """The largest batch of each group: the inputs of the others are its first rows."""
        self.functions: dict[str, Any] = {}
        self.made: dict[str, tuple[Inputs, Inputs]] = {}
        self.graphs: dict[Case, timing.Graph] = {}

    def first(self, case: Case) -> float:
        """Seconds of the first call."""
        return timing.elapsed(self.prepare(case))

    def sample(self, case: Case, calls: int) -> float:
        """Seconds of the fastest of some calls; on a GPU, of the GPU's part of a call."""
        if self.device == "cpu":
            call = self.prepare(case)
            return timing.fastest(call for _ in range(calls + 1))
        if case not in self.graphs:
            self.graphs[case] = self._record(case, calls)
        return self.graphs[case].seconds()

    def digests(self, case: Case) -> list[str]:
        """A digest of each row of the result."""
        results = self.prepare(case)()
        tensors = [results] if isinstance(results, torch.Tensor) else results
        return ["".join(row) for row in zip(*map(timing.row_digests, tensors), strict=True)]

    def forget(self, counts: bool = True) -> None:
        """Give up the inputs, graphs and compiled code."""
        for held in (self.functions, self.made, self.graphs):
            held.clear()
        torch.compiler.reset()
        timing.forget_peak()

    def prepare(self, case: Case) -> Callable[[], Any]:
        """One call with its inputs."""
        function, inputs = self._function(case), self._inputs(case)
        return lambda: function(*inputs)

    def _record(self, case: Case, calls: int) -> timing.Graph:
        """The least number of calls that uses every copy of the inputs equally often."""
        function = self._function(case)
        copies = timing.copies_beyond_cache(self._inputs(case))
        copies *= -(-calls // len(copies))
        return timing.Graph([lambda i=i: function(*i) for i in copies])  # type: ignore[misc]

    def _function(self, case: Case) -> Any:
        if case.group not in self.functions:
            copied = copy(OPS[case.kind], case.group)
            function = under(self.system, copied)
            backward = case.kind == "attention_backward"
            self.functions[case.group] = _with_gradients(function) if backward else function
        return self.functions[case.group]

    def _inputs(self, case: Case) -> Inputs:
        if case.group not in self.made:
            make = Maker(self.rows[case.group], self.device, self.dtype)
            self.made[case.group] = INPUTS[case.kind](make, *case.sizes)
        batched, shared = self.made[case.group]
        # Copied: products are faster where memory goes on behind the rows (kernels/common/room.py).
        return [*(t[: case.batch].clone() for t in batched), *shared]


def _with_gradients(function: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The result of a function and the gradients of its inputs; that of the result comes last."""

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *read, gradient = inputs
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in read]
            result = function(*leaves)
            return result.detach(), *torch.autograd.grad(result, leaves, gradient)

    return call


class Maker:
    """Makes normal numbers on the device; row i is the same however many rows are made."""

    def __init__(self, rows: int, device: str, dtype: torch.dtype) -> None:
        self.rows = rows
        self.like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.generator = torch.Generator(device).manual_seed(0)

    def batch(self, *shape: int) -> torch.Tensor:
        """[rows, *shape]."""
        made = torch.empty(self.rows, *shape, **self.like)
        for row in made:
            row.normal_(generator=self.generator)
        return made

    def one(self, *shape: int) -> torch.Tensor:
        """[*shape], a weight."""
        made = torch.empty(*shape, **self.like).normal_(generator=self.generator)
        return torch.nn.Parameter(made, requires_grad=False)


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


def _decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def _prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    return weight * wide.to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, weight.shape, weight)


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


def _log_softmax(x: torch.Tensor) -> torch.Tensor:
    return x.log_softmax(-1)


def _conv2d(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, weight, padding="same")


def _depthwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, weight, padding="same", groups=weight.shape[0])


OPS: Mapping[str, Any] = {
    "mm": _mm,
    "decode": _decode,
    "prefill": _prefill,
    "attention_backward": _prefill,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "conv2d": _conv2d,
    "depthwise": _depthwise,
}


def _attention(make: Maker, h: int, kv: int, q: int, s: int, d: int) -> tuple[Inputs, Inputs]:
    return [make.batch(h, q, d), make.batch(kv, s, d), make.batch(kv, s, d)], []


def _attention_backward(make: Maker, h: int, kv: int, s: int, d: int) -> tuple[Inputs, Inputs]:
    inputs, shared = _attention(make, h, kv, s, s, d)
    return [*inputs, make.batch(h, s, d)], shared


# Batched inputs and shared ones, from the sizes in the group's name.
INPUTS: Mapping[str, Callable[..., tuple[Inputs, Inputs]]] = {
    "mm": lambda make, k, n: ([make.batch(k)], [make.one(n, k)]),
    "decode": lambda make, h, kv, s, d: _attention(make, h, kv, 1, s, d),
    "prefill": lambda make, h, kv, s, d: _attention(make, h, kv, s, s, d),
    "attention_backward": _attention_backward,
    "rms_norm": lambda make, k: ([make.batch(k)], [make.one(k)]),
    "layer_norm": lambda make, k: ([make.batch(k)], [make.one(k)]),
    "softmax": lambda make, k: ([make.batch(k)], []),
    "log_softmax": lambda make, k: ([make.batch(k)], []),
    "conv2d": lambda make, c, n, i, w: ([make.batch(c, i, i)], [make.one(n, c, w, w)]),
    "depthwise": lambda make, c, i, w: ([make.batch(c, i, i)], [make.one(c, 1, w, w)]),
}
