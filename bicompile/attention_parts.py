"""Attention as one call of our op; what that refuses as products, softmax and dropout.

The passes judge each of these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bicompile.contract import HALF_AND_FLOAT


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`F.scaled_dot_product_attention` as a call of our op, any rank brought to B H Q D."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if dropout_p > 0.0 or query.dtype not in HALF_AND_FLOAT:
        return attention_in_parts(query, key, value, attn_mask, dropout_p, is_causal, scale)
    rank = query.dim()
    if rank > 4:
        lead = query.shape[:-3]
        if attn_mask is not None:
            full = (*lead, attn_mask.shape[-3] if attn_mask.dim() > 2 else 1)
            attn_mask = attn_mask.expand(*full, *attn_mask.shape[-2:]).flatten(0, rank - 4)
        query, key, value = (t.flatten(0, rank - 4) for t in (query, key, value))
    elif rank < 4:
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        query, key, value = (_to_rank_4(t) for t in (query, key, value))
    (batch,) = torch.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1])
    query, key, value = (
        t if statically_known_true(t.shape[0] == batch) else t.expand(batch, -1, -1, -1)
        for t in (query, key, value)
    )
    out: torch.Tensor = torch.ops.bicompile.sdpa.default(
        query, key, value, attn_mask, is_causal, scale
    )
    if rank > 4:
        out = out.unflatten(0, lead)
    elif rank < 4:
        out = out.squeeze(1) if rank == 3 else out.squeeze(1).squeeze(0)
    return out


def _to_rank_4(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(1) if x.dim() == 3 else x.unsqueeze(0).unsqueeze(0)


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
