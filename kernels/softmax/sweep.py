"""What `bicompile verify` tries on the softmax kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.kernels.reduce.sweep import Op, row_classes
from bicompile.kernels.softmax import gpu
from bicompile.sweep import BitClass, Depth

OPS = {
    "softmax": Op(lambda x, s: gpu.softmax(x, 1, x.dtype, chosen=s), quick=True),
    "softmax_statistics": Op(lambda x, s: torch.cat(gpu.softmax_statistics(x, 1, chosen=s), 1)),
    "softmax_backward": Op(lambda x, s: gpu.softmax_backward(x, x, 1, x.dtype, chosen=s)),
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table of the row kernels."""
    return row_classes("softmax", OPS, depth)
