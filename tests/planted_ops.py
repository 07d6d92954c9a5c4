"""Ops with a contract that one of them breaks; loaded by `bicompile soak --load planted_ops`."""

from __future__ import annotations

import torch

import bicompile


@torch.library.custom_op("planted::honest", mutates_args=())
def honest(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.library.custom_op("planted::small_batches", mutates_args=())
def small_batches(x: torch.Tensor) -> torch.Tensor:
    """A kernel that takes another way for less than three rows."""
    return x * 2 if len(x) > 2 else x * (2 + 2**-8)


for op in (honest, small_batches):
    op.register_fake(torch.empty_like)
bicompile.register_op(torch.ops.planted.honest, "x: M K -> M K", order="no sum")
bicompile.register_op(torch.ops.planted.small_batches, "x: M K -> M K", order="no sum")
