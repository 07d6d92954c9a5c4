"""What `bicompile verify` tries on the normalisations."""

from __future__ import annotations

from collections.abc import Iterator

from bicompile.kernels.norm import gpu
from bicompile.kernels.reduce.sweep import Op, row_classes
from bicompile.sweep import BitClass, Depth


def _rms_norm(offset: float, round_first: bool) -> Op:
    def run(x, w, s):
        return gpu.rms_norm(x, 1, w, 1e-6, offset, round_first, chosen=s)

    return Op(run, weights=1, quick=round_first)


def _group_norm(x, s):
    """Each row is a sample of one group and one channel."""
    return gpu.group_norm(x[:, None], None, None, 1, 1e-5, chosen=s)


def _layer_norm_backward(x, w, s):
    """Any numbers serve as statistics."""
    return gpu.layer_norm_backward(x, x, 1, x[:, :1], x[:, -1:], w, chosen=s)


def _group_norm_backward(x, s):
    return gpu.group_norm_backward(x[:, None], x[:, None], x[:, :1], x[:, -1:], None, 1, chosen=s)[
        :, 0
    ]


OPS = {
    "rms_norm": _rms_norm(0.0, True),
    "rms_norm 1 + w": _rms_norm(1.0, False),
    "layer_norm": Op(
        lambda x, w, b, s: gpu.layer_norm(x, 1, w, b, 1e-5, chosen=s), weights=2, quick=True
    ),
    "group_norm": Op(_group_norm),
    "layer_norm_backward": Op(_layer_norm_backward, weights=1),
    "group_norm_backward": Op(_group_norm_backward),
}


def classes(depth: Depth) -> Iterator[BitClass]:
    """One bit class per entry of the table of the row kernels."""
    return row_classes("norm", OPS, depth, cut=False)
