"""Triton kernel of qk_norm_rope: some heads of one token, of the query or of the key."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import block_sum, load_terms, positions, row_shape, rsqrt
from bicompile.kernels.norm.gpu import scaled
from bicompile.kernels.rope.schedules import schedule


@triton.jit(do_not_specialize=["SEQ", "sqb", "skb", "scb", "ssb"])
def qk_norm_rope_kernel(
    Q, K, WQ, WK, COS, SIN, YQ, YK, SEQ, sqb, sqs, sqh, skb, sks, skh, scb, scs, ssb, sss,
    eps, offset, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, R heads): first those of the query, then those of the key."""
    after_others(PDL)
    token = tl.program_id(0).to(tl.int64)
    b = token // SEQ
    s = token % SEQ
    of_q = tl.cdiv(H, R)
    is_q = tl.program_id(1) < of_q
    heads = tl.where(is_q, H, G)
    head = tl.where(is_q, tl.program_id(1), tl.program_id(1) - of_q) * R + tl.arange(0, R)
    here = (head < heads)[:, None, None]
    x_at = tl.where(is_q, Q + b * sqb + s * sqs, K + b * skb + s * sks)
    w_at = tl.where(is_q, WQ, WK)
    y_at = tl.where(is_q, YQ, YK) + token * heads * D
    row = (head.to(tl.int64) * tl.where(is_q, sqh, skh))[:, None, None]
    d = positions(J, L)
    inside = here & (d < D)
    x = load_terms(x_at, row, here, d, D, 1, 0.0)
    total = block_sum((x * x).to(tl.float64), R, J, L)
    scale = rsqrt((total / D).to(tl.float32) + eps)[:, None, None]
    TYPE: tl.constexpr = Q.dtype.element_ty
    FRONT: tl.constexpr = D - D // 2
    other = tl.where(d < FRONT, d + D // 2, d - FRONT)
    w = load_terms(w_at, 0, inside, d, D, 1, 0.0)
    y = scaled(x, scale, w, offset, HAS_OFFSET, ROUND_FIRST, TYPE)
    x = load_terms(x_at, row, inside, other, D, 1, 0.0)
    w = load_terms(w_at, 0, inside, other, D, 1, 0.0)
    turned = scaled(x, scale, w, offset, HAS_OFFSET, ROUND_FIRST, TYPE).to(tl.float32)
    turned = tl.where(d < FRONT, -turned, turned)
    cos = tl.load(COS + b * scb + s * scs + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(SIN + b * ssb + s * sss + d, mask=d < D, other=0.0).to(tl.float32)
    y = (y.to(tl.float32) * cos).to(TYPE).to(tl.float32)
    y = y + (turned * sin).to(TYPE).to(tl.float32)
    tl.store(y_at + head[:, None, None] * D + d, y.to(TYPE), mask=inside)


def qk_norm_rope(
    query, key, query_weight, key_weight, cos, sin, eps, offset, round_first, chosen=None
):
    """query [B, Q, H, D], key [B, Q, G, D], cos and sin [B or 1, 1, Q, D] -> [B, H or G, Q, D]."""
    (b, s, h, d), g = query.shape, key.shape[2]
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    tokens = b * s
    if tokens and d and h + g:
        query, key, cos, sin = (x if x.stride(3) == 1 else x.contiguous()
                                for x in (query, key, cos, sin))  # fmt: skip
        j, lanes = row_shape(d)
        use = chosen or schedule(tokens)
        programs = triton.cdiv(h, use.heads) + triton.cdiv(g, use.heads)
        turns = [n for x in (cos, sin) for n in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(2))]
        launch(
            qk_norm_rope_kernel, (tokens, programs), query, key, query_weight.contiguous(),
            key_weight.contiguous(), cos, sin, *outputs, s, *query.stride()[:3],
            *key.stride()[:3], *turns, float(eps), float(offset), H=h, G=g, D=d,
            HAS_OFFSET=offset != 0, ROUND_FIRST=bool(round_first), R=use.heads, J=j, L=lanes,
            num_warps=use.warps,
        )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in outputs)
