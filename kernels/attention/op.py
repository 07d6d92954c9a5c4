"""The op of the attention family: shapes, reference and contract."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bicompile.contract import Case, Contract
from bicompile.errors import UnsupportedGradient
from bicompile.registry import Kernel, define_part, register


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


def _fake_range(attn_mask):
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return attn_mask.new_empty((*shape[:3], 4), dtype=torch.int32)


def _fake_visible(query, key, value, attn_mask, visible, scale):
    return _fake(query, key, value, attn_mask, False, scale)


# sdpa with a mask on a GPU, in two steps: what each row of the mask sees (int32 [B, H, Q, 4], see
# `masks`), and the rest. `passes.canonicalize` opens it, so that layers share the first step.
define_part(sdpa, "visible_range", "(Tensor attn_mask) -> Tensor", _fake_range)
define_part(
    sdpa,
    "sdpa_visible",
    "(Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor visible, float scale)"
    " -> Tensor",
    _fake_visible,
)


def _backward(ctx, grad):
    raise UnsupportedGradient(op="scaled_dot_product_attention")


torch.library.register_autograd("bicompile::sdpa", _backward)
