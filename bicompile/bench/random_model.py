"""A decoder model of any size with random weights, called as transformers' `generate` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bicompile.bench import timing
from bicompile.bench.cases import Case, Shapes, System
from bicompile.bench.systems import dtype_named, made_on, under

ROOM = 128
"""Slots of a cache beyond the context or the prompt."""
_WARM_CALLS = 3  # CUDA graphs: one to warm up, one to record, one to replay


def build(shapes: Shapes, device: str, dtype: str) -> Any:
    """A Qwen3 model; its weights are drawn on the device, the same in each process."""
    import transformers

    config = transformers.Qwen3Config(
        num_hidden_layers=shapes.layers,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_size,
        vocab_size=shapes.vocabulary,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with made_on(device):
        make: Any = transformers.AutoModelForCausalLM.from_config
        model = make(config, dtype=dtype_named(dtype))
    return model.eval().requires_grad_(False)


def make_cache(model: Any, batch: int, slots: int) -> Any:
    """An empty static cache; its tensors exist before the first call, as CUDA graphs need it."""
    import transformers

    config = model.config
    cache = transformers.StaticCache(config=config, max_cache_len=slots)
    sizes = config.num_key_value_heads, config.head_dim
    cache.early_initialization(batch, *sizes, model.dtype, model.device)
    return cache


def set_length(cache: Any, length: int) -> None:
    """Say how many slots of a cache are filled."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def inputs(
    model: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor, positions: torch.Tensor
) -> dict[str, Any]:
    """What `generate` hands to the compiled model: among others, masks of all slots [B, 1, Q, S].

    Args:
        model: the model.
        ids: [B, Q].
        cache: as filled before the call.
        mask: which tokens are there, those of the cache included [B, T].
        positions: [B, Q].
    """
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(
        ids, cache=cache, attention_mask=mask, position_ids=positions, use_cache=True
    )
    return prepared | {"logits_to_keep": 1}


class RandomModel:
    """Prefill into an empty cache, and decode steps after a context of random keys and values."""

    def __init__(self, system: System, shapes: Shapes, device: str, dtype: str) -> None:
        self.device = device
        self.model = build(shapes, device, dtype)
        self.forward = under(system, self.model.forward, self.model)
        self.peak = 0.0
        self.held: dict[Case, tuple[Any, int, list[dict[str, Any]]]] = {}

    def first(self, case: Case) -> float:
        """Seconds of the first call; a few more are made, until everything is recorded."""
        cache, length, (step, *_) = self.hold(case)
        seconds = timing.elapsed(lambda: self.forward(**step))
        for _ in range(_WARM_CALLS if self.device == "cuda" else 0):
            set_length(cache, length)
            self.forward(**step)
        return seconds

    def sample(self, case: Case, calls: int) -> float:
        """Seconds of a step when so many follow each other."""
        cache, length, steps = self.hold(case)
        set_length(cache, length)
        if case.kind == "decode":
            while len(steps) < calls:
                steps.append(self._decode_inputs(case, cache, length + len(steps)))
            set_length(cache, length)
            return timing.per_step([self._call(step) for step in steps[:calls]])
        return timing.per_step([self._call(steps[0], empty=cache)] * calls)

    def digests(self, case: Case) -> list[str]:
        """A digest of each row's logits."""
        cache, length, (step, *_) = self.hold(case)
        set_length(cache, length)
        return timing.row_digests(self.forward(**step).logits)

    def forget(self, counts: bool = True) -> None:
        """Give up all caches and compiled code; `counts`: whether their memory does."""
        self.peak = self.memory() if counts else self.peak
        self.held.clear()
        torch.compiler.reset()
        timing.forget_peak()

    def memory(self) -> float:
        """The peak of the memory that counts, in MB."""
        return max(self.peak, timing.peak_memory())

    def _call(self, step: dict[str, Any], empty: Any = None) -> Callable[[], Any]:
        def call() -> None:
            if empty is not None:
                set_length(empty, 0)
            self.forward(**step)

        return call

    def hold(self, case: Case) -> tuple[Any, int, list[dict[str, Any]]]:
        """The cache of a case, its length before a call, and the inputs of its first steps."""
        if case not in self.held:
            (length,) = case.sizes
            cache = make_cache(self.model, case.batch, length + ROOM)
            if case.kind == "decode":
                self._fill(cache)
                self.held[case] = cache, length, [self._decode_inputs(case, cache, length)]
            else:
                self.held[case] = cache, 0, [self._prefill_inputs(case, cache, length)]
        return self.held[case]

    def _fill(self, cache: Any) -> None:
        """Random keys and values; row i is the same in every batch."""
        rng = torch.Generator(self.device).manual_seed(0)
        for i in range(cache.layers[0].keys.shape[0]):
            for layer in cache.layers:
                layer.keys[i].normal_(generator=rng)
                layer.values[i].normal_(generator=rng)

    def _tokens(self, batch: int, length: int) -> torch.Tensor:
        """Row i is the same in every batch."""
        rng = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        return torch.randint(3, vocabulary, (batch, length), generator=rng).to(self.device)

    def _prefill_inputs(self, case: Case, cache: Any, length: int) -> dict[str, Any]:
        ids = self._tokens(case.batch, length)
        positions = torch.arange(length, device=self.device).expand(case.batch, -1)
        set_length(cache, 0)
        return inputs(self.model, ids, cache, torch.ones_like(ids), positions)

    def _decode_inputs(self, case: Case, cache: Any, position: int) -> dict[str, Any]:
        ids = self._tokens(case.batch, 1)
        seen = torch.ones(case.batch, position + 1, dtype=torch.long, device=self.device)
        positions = torch.full((case.batch, 1), position, device=self.device)
        set_length(cache, position)
        prepared = inputs(self.model, ids, cache, seen, positions)
        set_length(cache, position)
        return prepared
