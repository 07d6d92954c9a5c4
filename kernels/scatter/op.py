"""Ops of the scatter family: shapes, references and contracts."""

from __future__ import annotations

import torch

from bicompile.contract import Case, Contract
from bicompile.registry import Kernel, register


def index_add_reference(self, index, source, alpha):
    """`self` with each row of `source`, times `alpha`, added to its row `index`."""
    return torch.index_add(self, 0, index, source, alpha=alpha)


index_add = register(
    Kernel(
        name="index_add",
        schema="(Tensor self, Tensor index, Tensor source, float alpha) -> Tensor",
        contract=Contract(
            tuple(
                Case(
                    "self: S M, index: K, source: K M -> S M",
                    {"alpha": alpha},
                    indices={"index": "S"},
                )
                for alpha in (1.0, -0.5)
            )
        ),
        reference=index_add_reference,
        eager=index_add_reference,
        order="one chain in double from self on, by position in the source; rounded once",
    )
)
