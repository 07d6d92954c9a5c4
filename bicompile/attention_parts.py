"""Attention as products, softmax and dropout, for what our op refuses; the passes judge each."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `bicompile.kernels.attention` states, with dropout of the weights.

    Args:
        query: [..., H, Q, D].
        key: [..., G, S, D], each head for H / G heads of the queries.
        value: [..., G, S, E].
        mask: bool or int32, where 0 is not seen, or added to the scores; over [..., H, Q, S].
        dropout: the part of the weights that is dropped.
        is_causal: query i sees the keys up to i.
        scale: of the scores.
        softcap: bound of the scores, 0 for none.
        sinks: a score [H] that takes part in the sum of the weights.

    Returns:
        [..., H, Q, E].
    """
    group = query.shape[-3] // key.shape[-3] if query.dim() > 3 else 1
    key, value = (t.repeat_interleave(group, -3) if group > 1 else t for t in (key, value))
    score = (query @ key.mT) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if is_causal:
        mask = torch.ones_like(score, dtype=torch.bool).tril()
    if mask is not None and mask.is_floating_point():
        score = score + mask
    elif mask is not None:
        score = score.masked_fill(mask == 0, float("-inf"))
    if sinks is not None:
        sink = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    weights = torch.softmax(score, -1)[..., : key.shape[-2]]
    return F.dropout(weights, dropout) @ value
