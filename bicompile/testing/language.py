"""Properties of transformers' language models: padding, chunks, decoding, caches, reused prefixes.

The inputs of the batch give `input_ids` [B, T], of an encoder-decoder the source, and beside it
`decoder_input_ids` [B, T]; masks, positions and caches are made here.  Each property follows one
row; the reference is its logits alone, in one piece, without padding or cache.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from bicompile.testing.subject import Batch, Run, Subject

Choose = Callable[[str, st.SearchStrategy[Any]], Any]
SLOTS = (0, 1, 7, 64, 129)
"""Free slots of a static cache."""


@dataclass(frozen=True)
class Text:
    """Tokens whose logits are followed.

    Args:
        subject: the model under a backend.
        ids: the tokens [B, T].
        source: of an encoder-decoder, what its encoder reads [B, S].
    """

    subject: Subject
    ids: torch.Tensor
    source: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Text:
        """All rows of a batch."""
        ids = batch.inputs["input_ids"]
        if "decoder_input_ids" in batch.inputs:
            return cls(batch.subject, batch.inputs["decoder_input_ids"], ids)
        return cls(batch.subject, ids)

    def row(self, at: int) -> Text:
        """One row alone."""
        source = None if self.source is None else self.source[at : at + 1]
        return Text(self.subject, self.ids[at : at + 1], source)

    def part(self, start: int, end: int) -> Text:
        """Some of the tokens."""
        return Text(self.subject, self.ids[:, start:end], self.source)

    def logits(
        self,
        mask: torch.Tensor | None = None,
        cache: Any = None,
        source_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V] of tokens that follow those of the cache; the mask is of all tokens."""
        ids, before = self.ids, 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long, device=ids.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.source is not None:
            given = {f"decoder_{name}": value for name, value in given.items()}
            given["input_ids"] = self.source
            given["attention_mask"] = (
                torch.ones_like(self.source) if source_mask is None else source_mask
            )
        forward = self.subject.function.forward  # type: ignore[attr-defined]
        taken = inspect.signature(forward).parameters
        if "position_ids" in taken:
            given["position_ids"] = positions
        if "use_cache" in taken:
            given["use_cache"] = cache is not None
        if cache is not None:
            given["cache" if "cache" in taken else "past_key_values"] = cache
        found: torch.Tensor = self.subject.run(given)["logits"]
        return found

    def pieces(self, sizes: Sequence[int], cache: Any) -> torch.Tensor:
        """Logits [B, T, V], computed in chunks of so many tokens into a cache."""
        ends = list(itertools.accumulate(sizes))
        parts = [self.part(end - n, end) for end, n in zip(ends, sizes, strict=True)]
        return torch.cat([part.logits(cache=cache) for part in parts], 1)

    def cache(self, slots: int | None = None) -> Any:
        """A growing cache, or a static one of so many slots."""
        from transformers import DynamicCache, EncoderDecoderCache, StaticCache

        config = self.subject.function.config  # type: ignore[attr-defined]

        def make(length: int) -> Any:
            if slots is None:
                return DynamicCache(config=config)
            return StaticCache(config=config, max_cache_len=length)

        if self.source is None:
            return make(slots or 0)
        return EncoderDecoderCache(make(slots or 0), make(self.source.shape[1]))


def is_language_model(batch: Batch) -> bool:
    """A transformers model with logits for `input_ids`."""
    function = batch.subject.function
    config = getattr(function, "config", None)
    if config is None or not hasattr(function, "get_output_embeddings"):
        return False
    names = ["input_ids"]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    given = [batch.inputs.get(name) for name in names]
    return all(isinstance(ids, torch.Tensor) and ids.dim() == 2 for ids in given)


def has_cache(batch: Batch) -> bool:
    """A language model that generates."""
    can = getattr(batch.subject.function, "can_generate", lambda: False)
    return is_language_model(batch) and can()


def _row(batch: Batch, choose: Choose) -> tuple[int, Text, Run]:
    """A row, its tokens, and its logits alone."""
    row = choose("row", st.integers(0, batch.size - 1))
    text = Text.of(batch).row(row)
    return row, text, Run(f"of row {row} alone", text.logits)


def _padded(
    ids: torch.Tensor, row: int, side: str, count: int
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Tokens with others beside them, a mask in which those of one row are padding, and its own."""
    size, length = ids.shape
    filler = ids.flip(1).repeat(1, -(-count // length))[:, :count]
    parts, mine = ((filler, ids), slice(count, None))
    if side == "right":
        parts, mine = (ids, filler), slice(0, length)
    mask = torch.ones(size, length + count, dtype=torch.long, device=ids.device)
    mask[row] = 0
    mask[row, mine] = 1
    return torch.cat(parts, 1), mask, mine


def padding(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """The row among others, all padded by the others' tokens."""
    row, _, alone = _row(batch, choose)
    side = choose("side", st.sampled_from(("left", "right")))
    count = choose("padding", st.integers(1, 40))
    whole, source_mask = Text.of(batch), None
    ids, mask, mine = _padded(whole.ids, row, side, count)
    source = whole.source
    if source is not None:
        more = choose("padding of the source", st.integers(1, 40))
        source, source_mask, _ = _padded(source, row, side, more)

    def compute() -> torch.Tensor:
        text = Text(batch.subject, ids, source)
        return text.logits(mask, source_mask=source_mask)[row : row + 1, mine]

    return alone, Run(f"with {count} tokens of padding on the {side}", compute)


def _cuts(choose: Choose, length: int) -> list[int]:
    """Sizes of chunks of so many tokens."""
    ends = choose("cuts", st.sets(st.integers(1, max(length - 1, 1)), max_size=4))
    bounds = [0, *sorted(e for e in ends if e < length), length]
    return [b - a for a, b in itertools.pairwise(bounds)]


def chunks(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """Chunks into a growing cache."""
    _, text, alone = _row(batch, choose)
    sizes = _cuts(choose, text.ids.shape[1])
    return alone, Run(f"in chunks of {sizes} tokens", lambda: text.pieces(sizes, text.cache()))


def decode(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """A prompt, then one token after the other."""
    _, text, alone = _row(batch, choose)
    length = text.ids.shape[1]
    first = choose("prompt", st.integers(1, length))
    sizes = [first] + [1] * (length - first)
    return alone, Run(f"after {first} tokens one by one", lambda: text.pieces(sizes, text.cache()))


def cache(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """A static cache with free slots."""
    _, text, alone = _row(batch, choose)
    length = text.ids.shape[1]
    sizes = _cuts(choose, length)
    free = choose("free slots", st.sampled_from(SLOTS))
    return alone, Run(
        f"in chunks of {sizes} tokens, {free} slots free",
        lambda: text.pieces(sizes, text.cache(length + free)),
    )


def prefix(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """The first tokens come from a cache that was filled by the whole batch."""
    row, text, alone = _row(batch, choose)
    length = text.ids.shape[1]
    count = choose("prefix", st.integers(1, max(length - 1, 1)))

    def compute() -> torch.Tensor:
        held = text.cache()
        first = Text.of(batch).part(0, count).logits(cache=held)[row : row + 1]
        held.batch_select_indices(torch.tensor([row], device=text.ids.device))
        if count == length:
            return first
        return torch.cat([first, text.part(count, length).logits(cache=held)], 1)

    return alone, Run(f"after {count} tokens that a batch of {batch.size} computed", compute)
