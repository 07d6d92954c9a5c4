"""The reduce family."""

from bicompile.kernels.reduce import op

__all__ = ["op"]
