"""One row of attention through transformers' masks and caches, without a model around it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from transformers import masking_utils

from bicompile import attention_interface
from bicompile.testing import assert_same_bits

HEADS, GROUPS, SIZE = 4, 2, 16
BASE = {
    "hidden_size": HEADS * SIZE, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "head_dim": SIZE,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kind of attention: how the mask is made, and what else the scores meet."""

    config: str
    window: str | None = None
    mask: str = "create_causal_mask"
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False

    def make(self, window):
        config = getattr(transformers, self.config)(**BASE)
        if self.window is not None:
            setattr(config, self.window, window)
        config._attn_implementation = attention_interface.NAME
        return config


SLIDING = ("MistralConfig", "sliding_window", "create_sliding_window_causal_mask")
CHUNKED = ("Llama4TextConfig", "attention_chunk_size", "create_chunked_causal_mask")
VARIANTS = {
    "full": Variant("LlamaConfig"),
    "window": Variant(*SLIDING),
    "window, cap": Variant(*SLIDING, softcap=3.0),
    "window, sinks": Variant(*SLIDING, sinks=True),
    "chunked": Variant(*CHUNKED),
    "bias": Variant("LlamaConfig", bias=True),
}


class Rows:
    """Queries, keys and values of tokens [B, heads, T, D]; row 1 is followed."""

    def __init__(self, variant, length, dtype=torch.float32, window=8, device="cpu"):
        rng = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=rng).to(device, dtype)

        self.variant, self.config, self.length = variant, variant.make(window), length
        self.device = device
        self.qkv = tuple(draw(3, heads, length, SIZE) for heads in (HEADS, GROUPS, GROUPS))
        self.sinks = draw(HEADS) if variant.sinks else None
        self.table = draw(HEADS, 4 * length) if variant.bias else None
        self.alone = self(self.take([1]))

    def take(self, rows):
        return tuple(t[rows] for t in self.qkv)

    def __call__(self, qkv, mask=None, cache=None):
        """Attention [B, Q, H, D] of tokens that follow those of the cache."""
        query, key, value = qkv
        before = 0 if cache is None else int(cache.get_seq_length())
        make = getattr(masking_utils, self.variant.mask)
        embeds = query.new_empty(len(query), query.shape[2], 1)
        seen = make(
            config=self.config, inputs_embeds=embeds, attention_mask=mask, cache=cache,
            position_ids=None,
        )  # fmt: skip
        if cache is not None:
            key, value = cache.update(key, value, 0)
        bias = None
        if self.table is not None:
            at = torch.arange(query.shape[2], device=self.device)[:, None] + before
            distance = at - torch.arange(key.shape[2], device=self.device)
            bias = self.table[:, distance.clamp(min=0)][None]
        out, _ = attention_interface.attention(
            SimpleNamespace(is_causal=True), query, key, value, seen,
            softcap=self.variant.softcap, s_aux=self.sinks, position_bias=bias,
        )  # fmt: skip
        return out

    def same(self, out, what):
        assert_same_bits(out, self.alone, what)

    def pieces(self, qkv, sizes, cache, mask=None):
        out, start = [], 0
        for size in sizes:
            part = tuple(t[:, :, start : start + size] for t in qkv)
            out.append(self(part, None if mask is None else mask[:, : start + size], cache))
            start += size
        return torch.cat(out, 1)

    def padded(self, count, side):
        """All rows, a mask in which the row is padded by others' tokens, and where it is."""
        filler = tuple(t.flip(2).repeat(1, 1, 9, 1)[:, :, :count] for t in self.qkv)
        pairs = zip(filler, self.qkv, strict=True)
        mask = torch.ones(3, self.length + count, dtype=torch.long, device=self.device)
        mine = slice(count, None) if side == "left" else slice(0, self.length)
        mask[1] = 0
        mask[1, mine] = 1
        return tuple(torch.cat(p if side == "left" else p[::-1], 2) for p in pairs), mask, mine

    def caches(self, length):
        """A growing cache and static ones, by name; new ones for each run."""
        return {
            "growing cache": lambda: transformers.DynamicCache(config=self.config),
            "static cache": lambda: transformers.StaticCache(self.config, max_cache_len=length),
            "free slots": lambda: transformers.StaticCache(self.config, max_cache_len=length + 7),
        }


def check(rows, chunks, pads):
    """The row in the batch, padded, and through caches, alone and padded in the batch."""
    rows.same(rows(rows.qkv)[1:2], "in the batch")
    for sizes in chunks:
        for name, cache in rows.caches(rows.length).items():
            rows.same(rows.pieces(rows.take([1]), sizes, cache()), f"{name}, {sizes}")
    for count, side in pads:
        qkv, mask, mine = rows.padded(count, side)
        what = f"{count} tokens of padding on the {side}"
        rows.same(rows(qkv, mask)[1:2, mine], what)
        for first, *rest in chunks:
            for name, cache in rows.caches(rows.length + count).items():
                out = rows.pieces(qkv, [first + count, *rest], cache(), mask)
                rows.same(out[1:2, mine], f"{what}, {name}, {[first, *rest]}")
