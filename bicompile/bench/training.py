"""A training step of a model: forward with labels, as a user of transformers calls it, backward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from bicompile.bench import timing
from bicompile.bench.cases import Case, System
from bicompile.bench.systems import under


class OtherBits(Exception):
    """Two steps with the same batch gave other bits; the text says of what."""


class TrainingWork:
    """Steps without an optimizer: the loss of a batch, and the gradients of all weights."""

    def __init__(self, system: System, model: Any, device: str) -> None:
        self.device = device
        self.model = model.requires_grad_(True)
        self.forward = under(system, model.forward, model)
        self.peak = 0.0

    def first(self, case: Case) -> float:
        """Seconds of the first step; a second one is made, whose memory counts."""
        seconds = timing.elapsed(self._step(case))
        self._drop_gradients()
        timing.forget_peak()
        self._step(case)()
        self.peak = max(self.peak, timing.peak_memory())
        return seconds

    def sample(self, case: Case, calls: int) -> float:
        """Seconds of the fastest of some steps, forward and backward together."""
        return timing.fastest(self._step(case) for _ in range(calls + 1))

    def digests(self, case: Case) -> list[str]:
        """A digest of each row's logits.

        Raises:
            OtherBits: a second step gives other bits of the loss or of a gradient.
        """
        once, rows = self._bits(case)
        again, _ = self._bits(case)
        differ = [name for name in once if once[name] != again.get(name)]
        if differ:
            raise OtherBits(f"{len(differ)} of {len(once)} differ in a second step: {differ[0]}")
        return rows

    def forget(self, counts: bool = True) -> None:
        """Give up gradients and compiled code; memory counts only in `first`."""
        self._drop_gradients()
        torch.compiler.reset()
        timing.forget_peak()

    def memory(self) -> float:
        """The peak of the memory of a step, in MB."""
        return self.peak

    def _step(self, case: Case) -> Callable[[], Any]:
        """A step that finds no gradients; its output has the loss and the logits."""
        self._drop_gradients()
        ids = self._tokens(case)

        def step() -> Any:
            with torch.enable_grad():
                output = self.forward(input_ids=ids, labels=ids, use_cache=False)
                output.loss.backward()
            return output

        return step

    def _bits(self, case: Case) -> tuple[dict[str, str], list[str]]:
        """Digests of the loss and the gradients of a step by name, and of each row's logits."""
        output = self._step(case)()
        tensors = {"loss": output.loss, **{n: p.grad for n, p in self.model.named_parameters()}}
        found = {name: _digest(t) for name, t in tensors.items() if t is not None}
        return found, [_digest(row) for row in output.logits]

    def _drop_gradients(self) -> None:
        for weight in self.model.parameters():
            weight.grad = None

    def _tokens(self, case: Case) -> torch.Tensor:
        """Row i is the same in every batch."""
        rng = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        (length,) = case.sizes
        return torch.randint(3, vocabulary, (case.batch, length), generator=rng).to(self.device)


def _digest(tensor: torch.Tensor) -> str:
    """One digest of a tensor, over those of its rows: no row is longer than its last size."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    return hashlib.sha256("".join(timing.row_digests(rows)).encode()).hexdigest()
