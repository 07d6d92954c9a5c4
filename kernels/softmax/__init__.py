"""softmax and log_softmax over one axis, and their gradients.

`e[k] = exp(x[k] - max)`; `e[k] / sum` or `(x[k] - max) - log(sum)`.
Gradients, from the output y: `(g[k] - sum(g * y)) * y[k]` or `g[k] - exp(y[k]) * sum(g)`.

Bits: the maximum is exact in any order; on the CPU exp is ours, `sum` adds e[k] in the lanes and
the tree of `bicompile.kernels.reduce`, in double, and is rounded to float32; the last operations
are float32, rounded once more to the output's dtype.

Row law: a row reads itself alone, in an order that its length alone sets.
"""

from bicompile.kernels.softmax import op

__all__ = ["op"]
