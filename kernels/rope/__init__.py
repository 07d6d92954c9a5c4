"""qk_norm_rope: RMSNorm of the heads of queries and keys, then their rotary embedding.

With `n` the normalised head of size D and `h = D // 2`::

    rotated[d] = -n[d + h] if d < D - h else n[d - (D - h)]
    y[d] = n[d] * cos[d] + rotated[d] * sin[d]

Bits: n is bit for bit what `bicompile::rms_norm` gives; the two products and their sum are each
rounded to the dtype, as the ops that they replace do.

Row law: a head of a token reads itself, the weights, and cos and sin of its token.

Source: Su et al., RoFormer, 2021 (arXiv 2104.09864), in the halves that transformers uses.
"""

from bicompile.kernels.rope import op

__all__ = ["op"]
