"""The gradient of attention: shapes, reference and contract."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.errors import UnsupportedGradient
from bicompile.kernels.attention.op import SHAPES, sdpa, sdpa_reference
from bicompile.registry import Kernel, define_part, register


def sdpa_backward_reference(grad, query, key, value, attn_mask, is_causal, scale):
    """`ds = p * (dp - sum(p * dp)) * scale` for `p = softmax(...)` and `dp = grad @ value.T`.

    Then the gradients are `ds @ key`, `ds.T @ query` and `p.T @ grad`.
    """
    groups = key.shape[1]
    shared = query.shape[1] // groups
    keys, values = (t.repeat_interleave(shared, 1) for t in (key, value))
    # The weights are attention to a value that tells the keys apart.
    one = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(
        *key.shape[:2], -1, -1
    )
    p = sdpa_reference(query, key, one, attn_mask, is_causal, scale)
    dp = grad @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = (t.unflatten(1, (groups, shared)).sum(2) for t in (ds.mT @ query, p.mT @ grad))
    return ds @ keys, dk, dv


def _fake_backward(grad, query, key, value, attn_mask, is_causal, scale):
    return tuple(
        t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)
        for t in (query, key, value)
    )


def _eager_backward(grad, query, key, value, attn_mask, is_causal, scale):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out = sdpa.eager(*leaves, attn_mask, is_causal, scale)
    return torch.autograd.grad(out, leaves, grad)


sdpa_backward = register(
    Kernel(
        name="sdpa_backward",
        schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
        " bool is_causal, float scale) -> (Tensor, Tensor, Tensor)",
        contract=Contract(
            tuple(
                Case(
                    f"grad: B H Q D, {SHAPES}, attn_mask?: {mask} -> B H Q D, B H S D, B H S D",
                    {"is_causal": False, "scale": 0.125},
                    masks=("attn_mask",),
                )
                for mask in ("B H Q S", "Q S")
            )
        ),
        reference=sdpa_backward_reference,
        eager=_eager_backward,
        order="scores are computed again; the query's gradient: one chain over the keys; those of"
        " keys and values: one chain over the queries and heads of a group",
        fake=_fake_backward,
    )
)


def _fake_visible(grad, query, key, value, attn_mask, visible, scale):
    return _fake_backward(grad, query, key, value, attn_mask, False, scale)


# With a mask on a GPU: what its rows see is found once for all layers, as `sdpa_visible` has it.
define_part(
    sdpa_backward,
    "sdpa_backward_visible",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor attn_mask, Tensor visible,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    _fake_visible,
)


def _save(ctx, inputs, output):
    query, key, value, attn_mask, *ctx.rest, softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, attn_mask)
    without = {"a cap of attention scores": softcap != 0.0, "attention sinks": sinks is not None}
    ctx.without = next((what for what, given in without.items() if given), None)


def _backward(ctx, grad):
    if ctx.without:
        raise UnsupportedGradient(op=ctx.without)
    if ctx.needs_input_grad[3]:
        raise UnsupportedGradient(op="the mask of scaled_dot_product_attention")
    found = sdpa_backward.op(grad, *ctx.saved_tensors, *ctx.rest)
    return *found, None, None, None, None, None


torch.library.register_autograd("bicompile::sdpa", _backward, setup_context=_save)
