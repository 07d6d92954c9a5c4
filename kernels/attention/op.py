"""The op of the attention family: shapes, reference and contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bicompile.contract import Case, Contract
from bicompile.errors import UnsupportedGradient
from bicompile.registry import Kernel, register


def sdpa_reference(query, key, value, attn_mask, is_causal, scale):
    """`softmax(query @ key.T * scale + mask) @ value`; a row that sees no key is 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    score = (query @ key.mT) * scale
    visible = torch.ones(score.shape[-2:], dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        score = score + attn_mask
    score = score.masked_fill(~visible, float("-inf"))
    weight = torch.softmax(score, -1).nan_to_num(0.0)
    return weight @ value


def _fake(query, key, value, attn_mask, is_causal, scale):
    b, h, q, _ = query.shape
    return query.new_empty((b, q, h, value.shape[3])).transpose(1, 2)


def _eager(query, key, value, attn_mask, is_causal, scale):
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


_SHAPES = "query: B H Q D, key: B H S D, value: B H S D"

sdpa = register(
    Kernel(
        name="sdpa",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal,"
        " float scale) -> Tensor",
        contract=Contract(
            (
                Case(
                    f"{_SHAPES}, attn_mask?: B H Q S -> B H Q D",
                    {"is_causal": False, "scale": 0.125},
                    masks=("attn_mask",),
                ),
                Case(
                    f"{_SHAPES}, attn_mask?: Q S -> B H Q D",
                    {"is_causal": False, "scale": 0.25},
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


def _backward(ctx, grad):
    raise UnsupportedGradient(op="scaled_dot_product_attention")


torch.library.register_autograd("bicompile::sdpa", _backward)
