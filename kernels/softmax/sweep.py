"""What `bicompile verify` tries on the softmax kernels."""

from __future__ import annotations

from collections.abc import Iterator

from bicompile.kernels.reduce.sweep import FULL, Op, row_classes
from bicompile.kernels.softmax import gpu
from bicompile.sweep import BitClass, Depth

OPS = {
    "softmax": Op(lambda x, s: gpu.softmax(x, 1, x.dtype, chosen=s), quick=True),
    "log_softmax": Op(lambda x, s: gpu.log_softmax(x, 1, FULL, chosen=s)),
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table of the row kernels."""
    return row_classes("softmax", OPS, depth)
