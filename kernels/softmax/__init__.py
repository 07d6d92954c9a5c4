"""The softmax family."""

from bicompile.kernels.softmax import op

__all__ = ["op"]
