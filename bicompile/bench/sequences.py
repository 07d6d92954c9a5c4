"""Many requests served by one model: a fixed number of slots, prompts padded on the left, greedy.

The requests are served in batches, one after the other; a batch decodes until its longest answer is
done. Row i of everything is a request, so that what one request gets can be compared with what it
gets in other company.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bicompile.bench import timing
from bicompile.bench.cases import Sequences, Shapes, System
from bicompile.bench.random_model import build, inputs, make_cache, set_length
from bicompile.bench.systems import under


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens are wanted."""

    prompt: list[int]
    wanted: int


def make_requests(sequences: Sequences, vocabulary: int) -> list[Request]:
    """The same requests in each process."""
    draw = random.Random(0)
    return [
        Request(
            prompt=[draw.randrange(3, vocabulary) for _ in range(draw.randint(*sequences.prompt))],
            wanted=draw.randint(*sequences.tokens),
        )
        for _ in range(sequences.count)
    ]


class SequencesWork:
    """Serves requests with one model."""

    def __init__(
        self, system: System, shapes: Shapes, sequences: Sequences, device: str, dtype: str
    ) -> None:
        self.device = device
        self.sequences = sequences
        self.width = sequences.prompt[1]
        self.model = build(shapes, device, dtype)
        self.forward = under(system, self.model.forward, self.model)
        self.requests = make_requests(sequences, shapes.vocabulary)
        self.caches: dict[int, Any] = {}

    def prepare(self) -> float:
        """Compile; returns the seconds to the second token of the first requests."""
        slots = self.sequences.slots
        numbers = range(min(slots, self.sequences.count))
        seconds = timing.elapsed(lambda: self._serve(numbers, slots, most=2))
        for _ in range(2 if self.device == "cuda" else 0):  # CUDA graphs are recorded
            self._serve(numbers, slots, most=4)
        return seconds

    def serve(self, begin: int, end: int) -> dict[str, Any]:
        """Serve some requests: seconds, and the number of tokens."""
        answers: list[list[int]] = []

        def run() -> None:
            answers.extend(self._serve(range(begin, end), self.sequences.slots))

        return {"seconds": timing.elapsed(run), "tokens": sum(map(len, answers))}

    def answers(self, numbers: Sequence[int], slots: int) -> list[str]:
        """What some requests get: tokens, and names for the bits of the logits behind them."""
        named: list[list[str]] = []
        answers = self._serve(numbers, slots, named=named)
        rows = zip(answers, zip(*named, strict=True), strict=False)
        return [f"{tokens} {names[: len(tokens)]}" for tokens, names in rows]

    def _serve(
        self,
        numbers: Sequence[int],
        slots: int,
        most: int | None = None,
        named: list[list[str]] | None = None,
    ) -> list[list[int]]:
        """The tokens of some requests; slots that none of them takes are filled by repetition.

        Args:
            numbers: of the requests.
            slots: rows of the batch.
            most: end after so many tokens.
            named: receives the digest of each row's logits, step by step.
        """
        requests = [self.requests[numbers[i % len(numbers)]] for i in range(slots)]
        steps = most or max(r.wanted for r in requests)
        cache = self._cache(slots)
        step, mask = self._prompts(requests, cache)
        said: list[torch.Tensor] = []
        for i in range(steps):
            logits = self.forward(**step).logits[:, -1]
            said.append(logits.argmax(-1))
            if named is not None:
                named.append(timing.row_digests(logits))
            del logits  # the next replay of a CUDA graph writes there
            if i == 0:
                step = self._first_step(step, said[0], mask)
            else:
                _advance(step, said[-1], self.width + i)
        tokens = torch.stack(said, 1).tolist()
        return [t[: r.wanted] for t, r in zip(tokens, requests[: len(numbers)], strict=False)]

    def _prompts(self, requests: list[Request], cache: Any) -> tuple[dict[str, Any], torch.Tensor]:
        """The inputs of the prefill, and which tokens are there [B, Q]."""
        ids = [[0] * (self.width - len(r.prompt)) + r.prompt for r in requests]
        prompts = torch.tensor(ids, device=self.device)
        mask = (prompts > 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        set_length(cache, 0)
        return inputs(self.model, prompts, cache, mask, positions), mask

    def _first_step(
        self, prefill: dict[str, Any], token: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, Any]:
        """The inputs of the decode step after the prompts."""
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        positions = prefill["position_ids"][:, -1:] + 1
        return inputs(self.model, token[:, None], prefill["cache"], mask, positions)

    def _cache(self, slots: int) -> Any:
        if slots not in self.caches:
            length = self.width + self.sequences.tokens[1]
            self.caches[slots] = make_cache(self.model, slots, length)
        return self.caches[slots]


def _advance(step: dict[str, Any], token: torch.Tensor, slot: int) -> None:
    """Turn the inputs of a decode step into those of the next, as transformers would make them."""
    step["input_ids"] = token[:, None]
    step["position_ids"].add_(1)
    masks = step["attention_mask"]
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        mask[..., slot] = True
