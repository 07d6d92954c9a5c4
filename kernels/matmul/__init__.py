"""The matmul family."""

from bicompile.kernels.matmul import op

__all__ = ["op"]
