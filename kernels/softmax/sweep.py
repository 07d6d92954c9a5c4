"""What `bicompile verify` tries on the softmax kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.kernels.reduce.sweep import FULL, Op, row_classes
from bicompile.kernels.softmax import gpu
from bicompile.sweep import BitClass, Depth


def _gather(x, s):
    k = x.shape[1]
    places = torch.tensor([0, k // 2, k - 1], device=x.device).expand(len(x), -1)
    return gpu.log_softmax_gather(x, 1, places, FULL, chosen=s)


OPS = {
    "softmax": Op(lambda x, s: gpu.softmax(x, 1, x.dtype, chosen=s), quick=True),
    "log_softmax": Op(lambda x, s: gpu.log_softmax(x, 1, FULL, chosen=s)),
    "log_softmax_gather": Op(_gather),
    "softmax_backward": Op(lambda x, s: gpu.softmax_backward(x, x, 1, x.dtype, chosen=s)),
    "log_softmax_backward": Op(lambda x, s: gpu.log_softmax_backward(x, x, 1, FULL, chosen=s)),
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table of the row kernels."""
    return row_classes("softmax", OPS, depth)
