"""One process of the bench: holds one compiled system and times it when told to.

Requests and replies are JSON, one a line; see `Worker` in `bicompile.bench` for the other end.
A process holds one system only, so that no cache, patch or guard of one meets the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

CONTEXT = 128
SLOTS = 512


@dataclass(frozen=True)
class Case:
    """One thing to time; cases of one group share their first rows, which must agree in bits."""

    group: str
    batch: int

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.group} batch {self.batch}"


class Work(Protocol):
    """What a worker holds."""

    def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
        """Make one call ready; only what it returns is timed. Its result has one row per row."""


class ModelWork:
    """A language model: prefill of `CONTEXT` tokens, and decoding after them."""

    def __init__(self, system: str, settings: dict[str, Any]) -> None:
        from bicompile import models

        self.device = settings["device"]
        self.mode = settings["mode"]
        self.model, _ = models.load(
            settings["model"], dtype=_dtype(settings["dtype"]), device=self.device
        )
        self.model.forward = _compile(system, self.model.forward, self.model, self.mode)
        self.decoding: dict[int, list[Any]] = {}

    def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
        """Make a prefill into an empty cache, or the next decode step, ready."""
        if case.group == "prefill":
            return self._prefill(case.batch, self._cache(case.batch))
        return self._decode(case.batch)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        """Row i is the same in every batch."""
        import torch

        rng = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary, (batch, length), generator=rng).to(self.device)

    def _cache(self, batch: int) -> Any:
        import transformers

        config = self.model.config
        cache = transformers.StaticCache(config=config, max_cache_len=SLOTS)
        if self.mode:
            # CUDA graphs need tensors whose addresses are known before the graph.
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
            cache.early_initialization(batch, heads, size, self.model.dtype, self.model.device)
        return cache

    def _prefill(self, batch: int, cache: Any) -> Callable[[], torch.Tensor]:
        import torch

        ids = self._tokens(batch, CONTEXT)
        positions = torch.arange(CONTEXT, device=self.device).expand(batch, -1)
        return lambda: self._call(ids, torch.ones_like(ids), positions, cache)

    def _decode(self, batch: int) -> Callable[[], torch.Tensor]:
        """One step after the context; each call is the next step, until the cache is full."""
        import torch

        if batch not in self.decoding:
            cache = self._cache(batch)
            self._prefill(batch, cache)()
            self.decoding[batch] = [cache, CONTEXT]
        cache, position = self.decoding[batch]
        if position == SLOTS:
            position = CONTEXT
            for layer in cache.layers:
                layer.cumulative_length.fill_(CONTEXT)
        self.decoding[batch][1] = position + 1
        ids = self._tokens(batch, 1)
        positions = torch.full((batch, 1), position, device=self.device)
        visible = torch.arange(SLOTS, device=self.device) <= position
        mask = visible.expand(batch, 1, 1, SLOTS).contiguous()
        return lambda: self._call(ids, mask, positions, cache)

    def _call(self, ids: Any, mask: Any, positions: Any, cache: Any) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits


class OpWork:
    """Single ops at the sizes of the small model; the group's name holds the sizes."""

    def __init__(self, system: str, settings: dict[str, Any]) -> None:
        self.dtype = _dtype(settings["dtype"])
        self.device = settings["device"]
        self.system = system
        self.mode = settings["mode"]
        self.functions: dict[str, Any] = {}
        self.inputs: dict[Case, list[Any]] = {}

    def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
        """Make one call of an op ready."""
        name, _, sizes = case.group.partition(" ")
        if case.group not in self.functions:
            copied = _copy(OPS[name], case.group)
            self.functions[case.group] = _compile(self.system, copied, None, self.mode)
        function = self.functions[case.group]
        if case not in self.inputs:
            numbers = [int(n) for n in sizes.split("x")]
            inputs = OP_INPUTS[name](case.batch, *numbers, self.dtype)
            self.inputs[case] = [t.to(self.device) for t in inputs]
        inputs = self.inputs[case]
        return lambda: function(*inputs)


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


def _decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return sdpa(query, key, value, enable_gqa=True)


def _prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return sdpa(query, key, value, is_causal=True, enable_gqa=True)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    return weight * wide.to(x.dtype)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import layer_norm

    return layer_norm(x, weight.shape, weight)


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)


def _rows(batch: int, *shape: Any) -> torch.Tensor:
    """Normal numbers; row i is the same in every batch. The last of `shape` is the dtype."""
    import torch

    rng = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(shape[:-1], generator=rng) for _ in range(batch)]).to(shape[-1])


def _attention_inputs(b: int, h: int, kv: int, q: int, s: int, d: int, dt: Any) -> list[Any]:
    return [_rows(b, h, q, d, dt), _rows(b, kv, s, d, dt), _rows(b, kv, s, d, dt)]


OPS: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "decode": _decode,
    "prefill": _prefill,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
}
OP_INPUTS: dict[str, Callable[..., list[Any]]] = {
    "mm": lambda b, k, n, dt: [_rows(b, k, dt), _rows(n, k, dt)],
    "decode": lambda b, h, kv, s, d, dt: _attention_inputs(b, h, kv, 1, s, d, dt),
    "prefill": lambda b, h, kv, s, d, dt: _attention_inputs(b, h, kv, s, s, d, dt),
    "rms_norm": lambda b, k, dt: [_rows(b, k, dt), _rows(1, k, dt)[0]],
    "layer_norm": lambda b, k, dt: [_rows(b, k, dt), _rows(1, k, dt)[0]],
    "softmax": lambda b, k, dt: [_rows(b, k, dt)],
}


def _copy(function: Any, name: str) -> Any:
    """Give a function a code object of its own: what Dynamo learns of sizes, it keeps by code."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _compile(system: str, function: Any, owner: Any, mode: str | None) -> Any:
    """Put a function, or its owner's forward, under one system."""
    import torch

    import bicompile

    if system == "inductor":
        return torch.compile(function, mode=mode)
    if system == "bicompile":
        compiled = bicompile.compile(function if owner is None else owner, mode=mode)
        return compiled if owner is None else compiled.forward
    return function


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def first(work: Work, case: Case) -> float:
    """Seconds of the first call, which compiles."""
    start = time.perf_counter()
    call = work.prepare(case)
    call()
    _synchronize()
    return time.perf_counter() - start


def measure(work: Work, case: Case, calls: int) -> float:
    """The fastest of some calls, in seconds; the first call is left out."""
    best = float("inf")
    for i in range(calls + 1):
        call = work.prepare(case)
        _synchronize()
        start = time.perf_counter()
        call()
        _synchronize()
        best = min(best, time.perf_counter() - start) if i else best
    return best


def digests(work: Work, case: Case) -> list[str]:
    """A digest of the bits of each row."""
    import torch

    rows = work.prepare(case)().cpu().contiguous()
    return [hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).hexdigest() for row in rows]


def memory() -> float:
    """Peak memory of this process in MB: on a GPU the device's, otherwise the resident set."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(settings: dict[str, Any], requests: Any, reply: Callable[[Any], None]) -> None:
    """Load, then answer requests until there are no more."""
    import torch

    torch.set_num_threads(settings["threads"])
    kind: Any = ModelWork if settings["kind"] == "model" else OpWork
    work: Work = kind(settings["system"], settings)
    reply("ready")
    with torch.no_grad():
        for line in requests:
            request = json.loads(line)
            case = Case(*request["case"])
            if request["do"] == "first":
                reply(first(work, case))
            elif request["do"] == "measure":
                reply(measure(work, case, request["calls"]))
            elif request["do"] == "digests":
                reply(digests(work, case))
            else:
                reply(memory())


def main() -> None:
    """Serve on stdin and stdout; whatever else prints to stdout goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        serve(json.loads(sys.argv[1]), sys.stdin, reply)
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
