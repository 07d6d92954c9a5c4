"""A compiled model whose one row is followed through batches, padding, caches and chunks.

The reference of every comparison is the row alone, in one piece, without a cache or padding.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, StaticCache

import bicompile
from bicompile import testing


class Subject:
    """A compiled model and one row of embeddings [1, S, E] to be followed through it."""

    def __init__(self, model, length, compile=bicompile.compile, **kwargs):
        self.config, self.dtype, self.device = model.config, model.dtype, model.device.type
        self.length = length
        self.embed = model.get_input_embeddings()
        self.model = compile(model, **kwargs)
        self.row = self.random(1, length)
        self.reference = self(self.row)

    def random(self, batch, length):
        """Embeddings of random tokens."""
        rng = torch.Generator().manual_seed(batch)
        ids = torch.randint(3, self.config.vocab_size, (batch, length), generator=rng)
        with torch.no_grad():
            return self.embed(ids.to(self.device))

    def __call__(self, x, mask=None, cache=None, start=0):
        """Logits of `x` [B, S, E], which follows `start` tokens that the cache holds."""
        b, s, _ = x.shape
        if mask is None:
            mask = torch.ones(b, start + s, dtype=torch.long, device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -s:].contiguous()
        kwargs = {} if cache is None else {"cache": cache, "use_cache": True}
        if cache is None and self.config.model_type != "bert":
            kwargs["use_cache"] = False
        with torch.no_grad():
            output = self.model(
                inputs_embeds=x.contiguous(),
                attention_mask=mask,
                position_ids=positions,
                **kwargs,
            )
        return output.logits.clone()  # a CUDA graph writes its next result to the same place

    def static_cache(self, batch, slots):
        """A static cache that exists before the first call, as CUDA graphs need it."""
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = StaticCache(config=config, max_cache_len=slots)
        heads = config.num_key_value_heads
        cache.early_initialization(batch, heads, size, self.dtype, torch.device(self.device))
        return cache

    def pieces(self, x, chunks, cache):
        """Logits of `x`, computed chunk by chunk into `cache`."""
        assert sum(chunks) == x.shape[1]
        out, start = [], 0
        for size in chunks:
            out.append(self(x[:, start : start + size], cache=cache, start=start))
            start += size
        return torch.cat(out, 1)

    def expect(self, logits, what):
        testing.assert_same_bits(logits, self.reference, what)


def check_threads(subject):
    x = subject.random(8, subject.length)
    x[5] = subject.row[0]
    for threads in (1, 2):
        with testing.num_threads(threads):
            subject.expect(subject(x)[5:6], f"{threads} threads")
            subject.expect(subject(subject.row), f"{threads} threads, alone")


def check_batches(subject, batches=(2, 3, 5, 8, 17, 32)):
    check_few_rows(subject)  # first: then one graph serves all batches and lengths
    for batch in batches:
        x = subject.random(batch, subject.length)
        at = (batch * 7) % batch if batch < 5 else batch - 2
        for bad in (None, float("nan"), float("inf"), 3e4):
            if bad is not None:
                x = torch.full_like(x, bad)
            x[at] = subject.row[0]
            subject.expect(subject(x)[at : at + 1], f"row {at} of {batch}, neighbours {bad}")
            if bad is None and batch > 5:
                break


def check_few_rows(subject, batches=(2, 3, 5)):
    """Two tokens only: so few rows that libraries switch to other kernels."""
    alone = subject(subject.row[:, :2])
    for batch in batches:
        x = subject.random(batch, 2)
        x[-1] = subject.row[0, :2]
        testing.assert_same_bits(subject(x)[-1:], alone, f"two tokens, row {batch - 1} of {batch}")


def check_padding(subject):
    for batch, pad in ((1, 1), (1, 7), (1, 33), (3, 7)):
        junk = subject.random(batch, subject.length + pad)
        for side in ("left", "right"):
            x, mask = junk.clone(), torch.ones(batch, subject.length + pad, dtype=torch.long)
            real = slice(pad, None) if side == "left" else slice(0, subject.length)
            mask[-1, : pad if side == "left" else None] = 0
            mask[-1, real] = 1
            x[-1, real] = subject.row[0]
            logits = subject(x, mask.to(subject.device))
            subject.expect(logits[-1:, real], f"{side} padding of {pad} in a batch of {batch}")


def check_caches(subject):
    rest = subject.length - 40
    growing = DynamicCache(config=subject.config)
    subject.expect(subject.pieces(subject.row, [subject.length], growing), "growing cache")
    for chunks in ([30, 10, rest], [20] + [1] * (subject.length - 20)):
        growing = DynamicCache(config=subject.config)
        subject.expect(subject.pieces(subject.row, chunks, growing), f"growing cache {chunks}")
    for slots in (128, 512, 1024):
        for chunks in ([subject.length], [30, 10, rest], [40] + [1] * rest):
            static = StaticCache(config=subject.config, max_cache_len=slots)
            subject.expect(subject.pieces(subject.row, chunks, static), f"{slots} slots {chunks}")


def check_token_by_token(subject):
    growing = DynamicCache(config=subject.config)
    subject.expect(subject.pieces(subject.row, [1] * subject.length, growing), "token by token")


def check_prefix(subject):
    """A prefix that another request computed, in another batch and other chunks."""
    x = subject.random(3, subject.length)
    x[1] = subject.row[0]
    prefix = DynamicCache(config=subject.config)
    subject.pieces(x[:, :25], [10, 15], prefix)
    prefix.batch_select_indices(torch.tensor([1], device=subject.device))
    rest = subject(subject.row[:, 25:], cache=prefix, start=25)
    testing.assert_same_bits(rest, subject.reference[:, 25:], "reused prefix")
