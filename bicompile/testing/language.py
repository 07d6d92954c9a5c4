"""Properties of transformers' language models: padding, chunks, decoding, caches, reused prefixes.

The inputs of the batch give `input_ids` [B, T]; masks, positions and caches are made here.  Each
property follows one row; the reference is its logits alone, in one piece, without padding or cache.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from bicompile.testing.subject import Batch, Run, Subject

Choose = Callable[[str, st.SearchStrategy[Any]], Any]
SLOTS = (0, 1, 7, 64, 129)
"""Free slots of a static cache."""


def is_language_model(batch: Batch) -> bool:
    """A transformers model with logits for `input_ids`."""
    function = batch.subject.function
    ids = batch.inputs.get("input_ids")
    known = hasattr(function, "config") and hasattr(function, "get_output_embeddings")
    return known and isinstance(ids, torch.Tensor) and ids.dim() == 2


def has_cache(batch: Batch) -> bool:
    """A language model that generates."""
    can = getattr(batch.subject.function, "can_generate", lambda: False)
    config = getattr(batch.subject.function, "config", None)
    whole = getattr(config, "is_encoder_decoder", False)
    return is_language_model(batch) and can() and not whole


def logits(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None
) -> torch.Tensor:
    """Logits [B, T, V] of tokens that follow those of the cache; a mask is of all tokens."""
    before = 0 if cache is None else int(cache.get_seq_length())
    if mask is None:
        mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long, device=ids.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    taken = inspect.signature(subject.function.forward).parameters  # type: ignore[attr-defined]
    if "position_ids" in taken:
        given["position_ids"] = positions
    if "use_cache" in taken:
        given["use_cache"] = cache is not None
    if cache is not None:
        given["cache" if "cache" in taken else "past_key_values"] = cache
    results = subject.run(given)
    found: torch.Tensor = results["logits"]
    return found


def _row(batch: Batch, choose: Choose) -> tuple[int, torch.Tensor, Run]:
    """A row, its tokens [1, T], and its logits alone."""
    row = choose("row", st.integers(0, batch.size - 1))
    ids = batch.inputs["input_ids"][row : row + 1]
    return row, ids, Run(f"of row {row} alone", lambda: logits(batch.subject, ids))


def padding(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """The row among others, all padded by the others' tokens."""
    row, ids, alone = _row(batch, choose)
    side = choose("side", st.sampled_from(("left", "right")))
    count = choose("padding", st.integers(1, 40))
    length = ids.shape[1]
    all_ids = batch.inputs["input_ids"]
    filler = all_ids.flip(1).repeat(1, -(-count // length))[:, :count]
    parts, mine = (filler, all_ids), slice(count, None)
    if side == "right":
        parts, mine = (all_ids, filler), slice(0, length)
    mask = torch.ones(batch.size, length + count, dtype=torch.long, device=ids.device)
    mask[row] = 0
    mask[row, mine] = 1

    def compute() -> torch.Tensor:
        return logits(batch.subject, torch.cat(parts, 1), mask)[row : row + 1, mine]

    return alone, Run(f"with {count} tokens of padding on the {side}", compute)


def _pieces(subject: Subject, ids: torch.Tensor, sizes: Sequence[int], cache: Any) -> torch.Tensor:
    return torch.cat([logits(subject, part, cache=cache) for part in ids.split(list(sizes), 1)], 1)


def _growing(subject: Subject) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=subject.function.config)  # type: ignore[attr-defined]


def _cuts(choose: Choose, length: int) -> list[int]:
    """Sizes of chunks of so many tokens."""
    ends = choose("cuts", st.sets(st.integers(1, max(length - 1, 1)), max_size=4))
    bounds = [0, *sorted(e for e in ends if e < length), length]
    return [b - a for a, b in itertools.pairwise(bounds)]


def chunks(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """Chunks into a growing cache."""
    _, ids, alone = _row(batch, choose)
    sizes = _cuts(choose, ids.shape[1])
    subject = batch.subject
    return alone, Run(
        f"in chunks of {sizes} tokens", lambda: _pieces(subject, ids, sizes, _growing(subject))
    )


def decode(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """A prompt, then one token after the other."""
    _, ids, alone = _row(batch, choose)
    first = choose("prompt", st.integers(1, ids.shape[1]))
    sizes = [first] + [1] * (ids.shape[1] - first)
    subject = batch.subject
    return alone, Run(
        f"after {first} tokens one by one", lambda: _pieces(subject, ids, sizes, _growing(subject))
    )


def cache(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """A static cache with free slots."""
    _, ids, alone = _row(batch, choose)
    sizes = _cuts(choose, ids.shape[1])
    free = choose("free slots", st.sampled_from(SLOTS))
    subject = batch.subject

    def compute() -> torch.Tensor:
        from transformers import StaticCache

        config = subject.function.config  # type: ignore[attr-defined]
        return _pieces(
            subject, ids, sizes, StaticCache(config=config, max_cache_len=ids.shape[1] + free)
        )

    return alone, Run(f"in chunks of {sizes} tokens, {free} slots free", compute)


def prefix(batch: Batch, choose: Choose) -> tuple[Run, Run]:
    """The first tokens come from a cache that was filled by the whole batch."""
    row, ids, alone = _row(batch, choose)
    subject, length = batch.subject, ids.shape[1]
    count = choose("prefix", st.integers(1, max(length - 1, 1)))

    def compute() -> torch.Tensor:
        held = _growing(subject)
        first = logits(subject, batch.inputs["input_ids"][:, :count], cache=held)
        held.batch_select_indices(torch.tensor([row], device=ids.device))
        rest = logits(subject, ids[:, count:], cache=held) if count < length else ids[:, :0]
        parts = [first[row : row + 1], rest] if count < length else [first[row : row + 1]]
        return torch.cat(parts, 1)

    return alone, Run(f"after {count} tokens that a batch of {batch.size} computed", compute)
