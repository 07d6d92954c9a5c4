"""What the zoo holds of each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """A model and what it is called with.

    Args:
        kind: what sort of model it is.
        build: makes it.
        inputs: of the model and a batch size: tensors by name, rows along axis 0.
        outputs: names of the results whose rows are followed; by default the logits, or every
            tensor.
        laws: what is checked besides the batch: "padding", "cache".
        without: laws that do not hold, each with the reason.
        dtype: of the weights.
    """

    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Any, int], Inputs]
    outputs: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


def from_config(maker: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """What makes a random model of transformers: by an automatic class, or by its own."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        cls = getattr(transformers, maker)
        model: nn.Module = cls.from_config(made) if maker.startswith("Auto") else cls(made)
        return model

    return build
