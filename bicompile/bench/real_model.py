"""A real language model: prefill of `CONTEXT` tokens, and decoding after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bicompile import models
from bicompile.bench import timing
from bicompile.bench.cases import Case, System
from bicompile.bench.systems import dtype_named, under

CONTEXT = 128
SLOTS = 512


class RealModel:
    """The small real model, or the one that the user named."""

    def __init__(self, system: System, name: str | None, device: str, dtype: str) -> None:
        self.device = device
        self.model, _ = models.load(name, dtype=dtype_named(dtype), device=device)
        self.model.forward = under(system, self.model.forward, self.model)
        self.prefilling: dict[int, Any] = {}
        self.decoding: dict[int, list[Any]] = {}

    def first(self, case: Case) -> float:
        """Seconds to make a case ready and call it: `decode` also prefills its context."""
        return timing.elapsed(lambda: self.prepare(case)())

    def sample(self, case: Case, calls: int) -> float:
        """Seconds of the fastest of some calls."""
        return timing.fastest(self.prepare(case) for _ in range(calls + 1))

    def digests(self, case: Case) -> list[str]:
        """A digest of each row's logits."""
        return timing.row_digests(self.prepare(case)())

    def forget(self, counts: bool = True) -> None:
        """Give up the caches; the compiled model stays, since decoding needs prefill."""
        self.prefilling.clear()
        self.decoding.clear()

    def memory(self) -> float:
        """The peak of the memory, in MB."""
        return timing.peak_memory()

    def prepare(self, case: Case) -> Callable[[], torch.Tensor]:
        """Make a prefill into an empty cache, or the next decode step, ready."""
        if case.kind == "prefill":
            return self._prefill(case.batch, self._empty_cache(case.batch))
        return self._decode(case.batch)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        """Row i is the same in every batch."""
        rng = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary, (batch, length), generator=rng).to(self.device)

    def _empty_cache(self, batch: int) -> Any:
        """A new cache; on a GPU always the same one, for CUDA graphs know it by its address."""
        if self.device == "cpu":
            return self._cache(batch)
        if batch not in self.prefilling:
            self.prefilling[batch] = self._cache(batch)
        _set_length(self.prefilling[batch], 0)
        return self.prefilling[batch]

    def _cache(self, batch: int) -> Any:
        import transformers

        config = self.model.config
        cache = transformers.StaticCache(config=config, max_cache_len=SLOTS)
        if self.device != "cpu":
            # CUDA graphs need tensors whose addresses are known before the graph.
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
            cache.early_initialization(batch, heads, size, self.model.dtype, self.model.device)
        return cache

    def _prefill(self, batch: int, cache: Any) -> Callable[[], torch.Tensor]:
        ids = self._tokens(batch, CONTEXT)
        positions = torch.arange(CONTEXT, device=self.device).expand(batch, -1)
        return lambda: self._call(ids, torch.ones_like(ids), positions, cache)

    def _decode(self, batch: int) -> Callable[[], torch.Tensor]:
        """One step after the context; each call is the next step, until the cache is full."""
        if batch not in self.decoding:
            cache = self._cache(batch)
            self._prefill(batch, cache)()
            self.decoding[batch] = [cache, CONTEXT]
        cache, position = self.decoding[batch]
        if position == SLOTS:
            position = CONTEXT
            _set_length(cache, CONTEXT)
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


def _set_length(cache: Any, length: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
