"""The norm family."""

from bicompile.kernels.norm import op

__all__ = ["op"]
