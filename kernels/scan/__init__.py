"""Running sums, products and logarithms of sums of exponentials along one axis.

`cumsum`: `y[k] = x[0] + ... + x[k]`; `cumprod`: the product; `logcumsumexp`:
`log(exp(x[0]) + ... + exp(x[k]))`, carried as a maximum and the sum of `exp(x - maximum)`.

Bits, on a CPU: one chain in double along the axis, in rising k; each output is rounded once::

    acc = 0.0                       # 1.0 for the product
    for k in range(K):
        acc = acc + x[k]
        y[k] = acc

On a GPU, blocks of 1024 elements are counted from element 0, in a block runs of 32; in a run, the
total of the left half goes before each element of the right half, at widths 2, 4, ... 32. The
totals of the runs are scanned in the same way; `y = (blocks before + runs before) + within`.
Products are carried as mantissa and exponent there: a run may overflow where the row does not.

Row law: a row reads itself alone. An output reads the elements up to its own, in an order that its
place alone sets: the prefix of a longer row has the bits of the shorter row. A row that is
continued from a *rounded* output is another sum: the chain carries more digits than y.
"""

from bicompile.kernels.scan import op

__all__ = ["op"]
