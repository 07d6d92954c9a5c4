"""The op of the attention family: shapes, reference and contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, define_part, register


def sdpa_reference(query, key, value, attn_mask, is_causal, scale, softcap=0.0, sinks=None):
    """`softmax(capped(query @ key.T * scale) + mask) @ value`; a row that sees no key is 0.

    `capped(s) = softcap * tanh(s / softcap)`, or s where the cap is 0.  `sinks`: a score of each
    head that takes part in the sum of the weights and has no value.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    score = (query @ key.mT) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    visible = torch.ones(score.shape[-2:], dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        score = score + attn_mask
    score = score.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    weight = torch.softmax(score, -1).nan_to_num(0.0)
    return weight[..., : key.shape[2]] @ value


def _fake(query, key, value, attn_mask, is_causal, scale, softcap=0.0, sinks=None):
    b, h, q, _ = query.shape
    return query.new_empty((b, q, h, value.shape[3])).transpose(1, 2)


def _eager(query, key, value, attn_mask, is_causal, scale, softcap=0.0, sinks=None):
    if softcap:  # PyTorch has no op for it
        args = query, key, value, attn_mask, is_causal, scale, softcap, sinks
        return sdpa_reference(*args)
    if sinks is not None:  # a key of zeros, with a bias
        attn_mask = _with_sinks(query, key, attn_mask, sinks)
        key, value = (F.pad(t, (0, 0, 0, 1)) for t in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _with_sinks(query, key, attn_mask, sinks):
    """An additive mask with one more key."""
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    bias = torch.zeros(shape, dtype=query.dtype, device=query.device)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        bias = bias.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        bias = bias + attn_mask
    column = sinks.to(query.dtype)[:, None, None].expand(*shape[:-1], 1)
    return torch.cat([bias, column], -1)


SHAPES = "query: B H Q D, key: B H S D, value: B H S D"

sdpa = register(
    Kernel(
        name="sdpa",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal,"
        " float scale, float softcap=0.0, Tensor? sinks=None) -> Tensor",
        contract=Contract(
            (
                Case(
                    f"{SHAPES}, attn_mask?: B H Q S, sinks?: H -> B H Q D",
                    {"is_causal": False, "scale": 0.125, "softcap": 0.0},
                    masks=("attn_mask",),
                ),
                Case(
                    f"{SHAPES}, attn_mask?: Q S, sinks?: H -> B H Q D",
                    {"is_causal": False, "scale": 0.25, "softcap": 0.0},
                    masks=("attn_mask",),
                ),
                Case(
                    f"{SHAPES}, attn_mask?: B H Q S, sinks?: H -> B H Q D",
                    {"is_causal": False, "scale": 0.125, "softcap": 50.0},
                    masks=("attn_mask",),
                ),
            )
        ),
        reference=sdpa_reference,
        eager=_eager,
        order="CPU: exact maximum, then one chain over the keys; GPU: chunks of 512 keys counted"
        " from the first visible one, merged in order",
        fake=_fake,
    )
)


def _fake_range(attn_mask):
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return attn_mask.new_empty((*shape[:3], 4), dtype=torch.int32)


def _fake_visible(query, key, value, attn_mask, visible, scale, softcap=0.0, sinks=None):
    return _fake(query, key, value, attn_mask, False, scale)


# sdpa with a mask on a GPU, in two steps: what each row of the mask sees (int32 [B, H, Q, 4], see
# `masks`), and the rest. `passes.canonicalize` opens it, so that layers share the first step.
define_part(sdpa, "visible_range", "(Tensor attn_mask) -> Tensor", _fake_range)
define_part(
    sdpa,
    "sdpa_visible",
    "(Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor visible, float scale,"
    " float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _fake_visible,
)
