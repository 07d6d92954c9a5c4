"""The attention family."""

from bicompile.kernels.attention import op

__all__ = ["op"]
