"""The op of the rope family: shapes, reference and contract."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import KERNELS, Kernel, register


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _each(norm, query, key, query_weight, key_weight, cos, sin, eps, offset, round_first):
    outputs = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        n = norm(x, 1, weight, eps, offset, round_first).transpose(1, 2)
        outputs.append(n * cos + _rotate_half(n) * sin)
    return tuple(outputs)


def qk_norm_rope_reference(*args):
    """`n * cos + rotate_half(n) * sin` of the normalised heads of query and key."""
    return _each(KERNELS["rms_norm"].reference, *args)


def _eager(*args):
    return _each(KERNELS["rms_norm"].eager, *args)


def _fake(query, key, *_):
    return tuple(x.new_empty(x.shape).transpose(1, 2) for x in (query, key))


_TENSORS = "query: B Q H D, key: B Q H1 D, query_weight: D, key_weight: D"

qk_norm_rope = register(
    Kernel(
        name="qk_norm_rope",
        schema="(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos,"
        " Tensor sin, float eps, float offset, bool round_first) -> (Tensor, Tensor)",
        contract=Contract(
            tuple(
                Case(
                    f"{_TENSORS}, cos: {b} 1 Q D, sin: {b} 1 Q D -> B H Q D, B H1 Q D",
                    {"eps": 1e-6, "offset": offset, "round_first": round_first},
                )
                for b, offset, round_first in (("B", 0.0, True), ("1", 1.0, False))
            )
        ),
        reference=qk_norm_rope_reference,
        eager=_eager,
        order="mean of the rounded squares in the lanes of the reduce family; then pointwise",
        fake=_fake,
    )
)
