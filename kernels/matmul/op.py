"""Ops of the matmul family: shapes, references and contracts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register

ORDER = "one chain over K in pinned steps (CPU: 16 interleaved lanes and a fixed tree); never split"


def mm_reference(self, mat2, tf32=False):
    """`self @ mat2`."""
    return self @ mat2


def addmm_reference(self, mat1, mat2, beta, alpha, tf32=False):
    """`beta * self + alpha * (mat1 @ mat2)`; `self` is not read where beta is 0."""
    product = alpha * (mat1 @ mat2)
    return product if beta == 0 else product + beta * self


def _addmm_fake(self, mat1, mat2, beta, alpha, tf32):
    return mat1.new_empty((*mat1.shape[:-1], mat2.shape[-1]))


mm = register(
    Kernel(
        name="mm",
        schema="(Tensor self, Tensor mat2, bool tf32) -> Tensor",
        contract=Contract((Case("self: M K, mat2: K N -> M N", {"tf32": False}),)),
        reference=mm_reference,
        eager=lambda self, mat2, tf32: torch.mm(self, mat2),
        order=ORDER,
    )
)

bmm = register(
    Kernel(
        name="bmm",
        schema="(Tensor self, Tensor mat2, bool tf32) -> Tensor",
        contract=Contract((Case("self: B M K, mat2: B K N -> B M N", {"tf32": False}),)),
        reference=mm_reference,
        eager=lambda self, mat2, tf32: torch.bmm(self, mat2),
        order=ORDER,
    )
)

_ADDMM_CASES = (
    Case("self: N, mat1: M K, mat2: K N -> M N", {"beta": 1.0, "alpha": 1.0, "tf32": False}),
    Case("self: M N, mat1: M K, mat2: K N -> M N", {"beta": 0.5, "alpha": -2.0, "tf32": False}),
    Case("self: M N, mat1: M K, mat2: K N -> M N", {"beta": 0.0, "alpha": 1.0, "tf32": False}),
)

addmm = register(
    Kernel(
        name="addmm",
        schema="(Tensor self, Tensor mat1, Tensor mat2, float beta, float alpha, bool tf32)"
        " -> Tensor",
        contract=Contract(_ADDMM_CASES),
        reference=addmm_reference,
        eager=lambda self, mat1, mat2, beta, alpha, tf32: torch.addmm(
            self, mat1, mat2, beta=beta, alpha=alpha
        ),
        order=ORDER + "; alpha, then beta * self, rounded once",
        fake=_addmm_fake,
    )
)

_BADDBMM_CASES = (
    Case(
        "self: B M N, batch1: B M K, batch2: B K N -> B M N",
        {"beta": 1.0, "alpha": 0.125, "tf32": False},
    ),
    Case(
        "self: M N, batch1: B M K, batch2: B K N -> B M N",
        {"beta": 2.0, "alpha": 1.0, "tf32": False},
    ),
)

baddbmm = register(
    Kernel(
        name="baddbmm",
        schema="(Tensor self, Tensor batch1, Tensor batch2, float beta, float alpha, bool tf32)"
        " -> Tensor",
        contract=Contract(_BADDBMM_CASES),
        reference=addmm_reference,
        eager=lambda self, batch1, batch2, beta, alpha, tf32: torch.baddbmm(
            self, batch1, batch2, beta=beta, alpha=alpha
        ),
        order=ORDER + "; alpha, then beta * self, rounded once",
        fake=_addmm_fake,
    )
)


def grouped_mm_reference(self, mat2, offs, tf32=False):
    """Rows from offs[g - 1] to offs[g] `@ mat2[g]`; rows behind the last offset are 0."""
    out = self.new_zeros((self.shape[0], mat2.shape[2]))
    begin = 0
    for matrix, end in zip(mat2, offs.tolist(), strict=True):
        out[begin:end] = self[begin:end] @ matrix
        begin = end
    return out


def _grouped_fake(self, mat2, offs, tf32):
    return self.new_empty((self.shape[0], mat2.shape[2]))


grouped_mm = register(
    Kernel(
        name="grouped_mm",
        schema="(Tensor self, Tensor mat2, Tensor offs, bool tf32) -> Tensor",
        contract=Contract(
            (Case("self: M K, mat2: G K N, offs: G -> M N", {"tf32": False}, ends={"offs": "M"}),)
        ),
        reference=grouped_mm_reference,
        eager=lambda self, mat2, offs, tf32: grouped_mm_reference(self, mat2, offs),
        order=ORDER + "; a row meets the matrix of its run",
        fake=_grouped_fake,
    )
)


def mm_add_reference(self, mat2, other, tf32=False):
    """`self @ mat2 + other`, the product rounded before."""
    return self @ mat2 + other


mm_add = register(
    Kernel(
        name="mm_add",
        schema="(Tensor self, Tensor mat2, Tensor other, bool tf32) -> Tensor",
        contract=Contract((Case("self: M K, mat2: K N, other: M N -> M N", {"tf32": False}),)),
        reference=mm_add_reference,
        eager=lambda self, mat2, other, tf32: torch.mm(self, mat2) + other,
        order=ORDER + "; rounded, then + other",
    )
)


def swiglu_reference(self, gate, up, tf32=False):
    """`silu(self @ gate) * (self @ up)`, each op rounded."""
    return F.silu(self @ gate) * (self @ up)


swiglu = register(
    Kernel(
        name="swiglu",
        schema="(Tensor self, Tensor gate, Tensor up, bool tf32) -> Tensor",
        contract=Contract((Case("self: M K, gate: K N, up: K N -> M N", {"tf32": False}),)),
        reference=swiglu_reference,
        eager=lambda self, gate, up, tf32: swiglu_reference(self, gate, up),
        order=ORDER + "; rounded, then silu(gate) * up",
    )
)


def qkv_proj_reference(self, q, k, v, q_bias, k_bias, v_bias, tf32=False):
    """`self @ q + q_bias`, and so for k and v; a bias may be None."""
    return tuple(
        self @ w if b is None else self @ w + b for w, b in ((q, q_bias), (k, k_bias), (v, v_bias))
    )


def _qkv_eager(self, q, k, v, q_bias, k_bias, v_bias, tf32):
    return tuple(
        torch.mm(self, w) if b is None else torch.addmm(b, self, w)
        for w, b in ((q, q_bias), (k, k_bias), (v, v_bias))
    )


def _qkv_fake(self, q, k, v, q_bias, k_bias, v_bias, tf32):
    return tuple(self.new_empty((self.shape[0], w.shape[1])) for w in (q, k, v))


qkv_proj = register(
    Kernel(
        name="qkv_proj",
        schema="(Tensor self, Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias,"
        " Tensor? v_bias, bool tf32) -> (Tensor, Tensor, Tensor)",
        contract=Contract(
            (
                Case(
                    "self: M K, q: K N, k: K N1, v: K N2, q_bias?: N, k_bias?: N1, v_bias?: N2"
                    " -> M N, M N1, M N2",
                    {"tf32": False},
                ),
            )
        ),
        reference=qkv_proj_reference,
        eager=_qkv_eager,
        order=ORDER + "; three products side by side",
        fake=_qkv_fake,
    )
)
