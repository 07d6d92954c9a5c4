"""Matrix products: mm, addmm, bmm, baddbmm, grouped_mm.

`c[m, n] = sum over k of a[m, k] * b[k, n]`, then `alpha * c + beta * self`, rounded once.

Bits: on the CPU, float32 and float16 (read as float32; fma and + round to nearest even)::

    lane = [0.0] * 16
    for k in range(round_up(K, 16)):                 # elements beyond K are 0
        lane[k % 16] = fma(a[m, k], b[k, n], lane[k % 16])
    for w in (8, 4, 2, 1):
        lane = [lane[i] + lane[i + w] for i in range(w)]
    c[m, n] = lane[0]

bfloat16 walks blocks of 32 and gives lane l element 2l + 1, then 2l; these fma (not the tree) flush
subnormal operands and results to zero, as `vdpbf16ps` does.  On a GPU: one chain of `tl.dot` over
rising k, no split of K; of float32 in full precision in float64, where the device is fast at that.

`grouped_mm` gives runs of rows a matrix each (the experts of a mixture): a row has the bits of
`mm` with the matrix of its run, whoever else is in the run. Where the runs end is data, which the
host of a GPU never reads.

Row law: the loop reads row m and column n alone, whatever M, N, strides, threads and tiles are. The
CPU has three schedules of it: ``rows.h`` for few rows where b is walked along K as it lies in
memory, ``columns.h`` for few rows where it is walked along N, ``panels.h`` (packed) for the rest.
"""

from bicompile.kernels.matmul import op

__all__ = ["op"]
