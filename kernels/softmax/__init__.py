"""softmax over one axis, what log_softmax needs of a row, and the gradient.

`e[k] = exp(x[k] - max)`; `e[k] / sum`, or `max` and `log(sum)`, of which `bicompile.log_softmax`
makes `(x[k] - max) - log(sum)`.  The gradient, from the output y: `(g[k] - sum(g * y)) * y[k]`.

Bits: the maximum is exact in any order; on the CPU exp is ours, `sum` adds e[k] in the lanes and
the tree of `bicompile.kernels.reduce`, in double, and is rounded to float32; the last operations
are float32, rounded once more to the output's dtype.

Row law: a row reads itself alone, in an order that its length alone sets.
"""

from bicompile.kernels.softmax import op

__all__ = ["op"]
