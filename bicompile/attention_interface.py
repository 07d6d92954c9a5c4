"""transformers models on our attention: `bicompile.use_attention`.

transformers lets a model's attention be a function of another package, and its masks, too.  Through
these reach our op what `F.scaled_dot_product_attention` has no argument for: a cap, sinks, and
where in its row each key of a window stands.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from bicompile import native
from bicompile.attention_parts import attention_in_parts
from bicompile.contract import HALF_AND_FLOAT
from bicompile.errors import UnsafeSetting
from bicompile.registry import load_all

M = TypeVar("M", bound=torch.nn.Module)

NAME = "batch_invariant"
"""The name under which transformers knows our attention."""

_SDPA = load_all()["sdpa"].op


def use_attention(model: M) -> M:
    """Let a transformers model compute all attention by our op; call it before `compile`.

    For models with sliding windows, and for those that transformers runs with "eager" attention
    because they cap their scores (Gemma 2) or have sinks (gpt-oss).  Models on "sdpa" without
    windows have the same bits with and without it; see docs/attention.md.

    Args:
        model: a transformers model; changed in place.

    Returns:
        the model.

    Bits:
        padding, chunks, decoding and every cache, rolling ones included, change no bit of a row, if
        its `attention_mask` covers all tokens that it has seen and its padding lies on one side.

    Raises:
        UnsafeSetting: the model is not of transformers, or a part of it has attention of its own.

    Example:
        >>> import transformers
        >>> config = transformers.MistralConfig(
        ...     vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
        >>> model = use_attention(transformers.MistralForCausalLM(config))
        >>> model.config._attn_implementation
        'batch_invariant'
    """
    choose = getattr(model, "set_attn_implementation", None)
    if choose is None:
        raise _refused(model, "is not a transformers model, so its attention cannot be chosen")
    register()
    before = model.config._attn_implementation  # type: ignore[union-attr]
    choose(NAME)
    if (part := _part_without(model)) is not None:
        choose(before)
        raise _refused(part, "computes attention of its own, which cannot be replaced")
    if any(p.device.type == "cpu" for p in model.parameters()):
        native.load()  # also for calls that are not compiled
    return model


def _refused(model: torch.nn.Module, reason: str) -> UnsafeSetting:
    return UnsafeSetting(
        setting="the attention",
        value=f"that of {type(model).__name__}",
        reason=f"this model {reason}",
        accepted=["transformers models whose attention is chosen by attn_implementation"],
        todo="call use_attention on the part that has such attention (of a multimodal model, its "
        "language model), or compile the model as it is: docs/attention.md says what holds then",
    )


_CHOICES = ("attention_backend", "sdpa", "flash_attn", "flex_attn")


def _part_without(model: torch.nn.Module) -> torch.nn.Module | None:
    """The first part whose attention is not ours, or which knows no other than its own."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        takes_others = any(getattr(part, f"_supports_{choice}", False) for choice in _CHOICES)
        if part.config._attn_implementation != NAME or not takes_others:
            return part
    return None


def register() -> None:
    """Make our attention and masks known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**kwargs: Any) -> torch.Tensor | None:
    """What transformers' `sdpa_mask` says; for a window, numbered.

    A cache of a window has lost its first keys: which key of the row each one is, is in the number.
    On a GPU queries whose keys have one numbering are computed together, others one by one.

    Args:
        kwargs: as transformers calls a function of masks.

    Returns:
        bool [B, 1, Q, S]; or int32, the number of the key in its row, from 1, and 0 where it is not
        seen; or None.
    """
    from transformers.masking_utils import sdpa_mask

    seen: torch.Tensor | None = sdpa_mask(**kwargs)
    if seen is None or kwargs.get("local_size") is None:
        return seen
    number = torch.arange(kwargs["kv_length"], device=seen.device) + kwargs["kv_offset"] + 1
    if kwargs.get("attention_mask") is not None:
        padding = kwargs["attention_mask"].to(torch.int32).argmax(-1)
        number = number - padding[:, None, None, None]
    return torch.where(seen, number, 0).to(torch.int32)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Our op as transformers calls attention.

    Args:
        module: the layer; says whether it is causal, if nothing else does.
        query: [B, H, Q, D].
        key: [B, G, S, D], each head for H / G heads of the queries.
        value: [B, G, S, E].
        attention_mask: of `mask`, or one that is added to the scores; over [B, H, Q, S].
        dropout: the part of the weights that is dropped.
        scaling: of the scores; D ** -0.5, if nothing is said.
        is_causal: whether a query without a mask sees the keys up to its own.
        position_bias: is added to the scores, over [B, H, Q, S] (T5).
        softcap: bound of the scores (Gemma 2).
        s_aux: a score [H] that takes part in the sum of the weights (gpt-oss).

    Returns:
        [B, Q, H, E], and no weights.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask, causal, query, key)
        causal = False
    if query.shape[0] != key.shape[0]:  # learned queries are the same for all rows
        query = query.expand(key.shape[0], -1, -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    args = (query, key, value, attention_mask)
    rest = (causal, scale, float(softcap or 0.0), s_aux)
    if dropout > 0.0 or query.dtype not in HALF_AND_FLOAT:
        out = attention_in_parts(*args, dropout, *rest)
    else:
        out = _SDPA(*args, *rest)
    return out.transpose(1, 2).contiguous(), None


def _biased(
    bias: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """The bias as an additive mask, -inf where a key is not seen."""
    if causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    if seen is None:
        return bias
    if seen.is_floating_point():
        return bias + seen
    return torch.where(seen != 0, bias, float("-inf"))
