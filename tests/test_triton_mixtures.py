"""The laws of the Triton kernels that a mixture of experts needs: topk and grouped_mm."""

import pytest
import torch
from triton_set_up import DEVICE, DTYPES, FULL, INF, INTERPRET, NAN, law, randn, same, views

from bicompile.kernels.matmul import gpu as matmul
from bicompile.kernels.matmul.table import schedules
from bicompile.kernels.sort import gpu as sort

KINDS = (
    ("half", DTYPES[0], False),
    ("double", FULL, False),
    ("ieee", FULL, False),
    ("tf32", FULL, True),
)
ENDS = ((0, 3, 3, 20), (23, 23, 23, 23), (1, 2, 3, 4))


@law
@pytest.mark.parametrize("kind,dtype,tf32", KINDS)
def test_a_row_meets_the_matrix_of_its_run(kind, dtype, tf32):
    m, k, n = (23, 70, 33) if INTERPRET else (230, 577, 130)
    a, w = randn(m, k, dtype=dtype), randn(4, n, k, dtype=dtype, seed=1)
    chosen = schedules(kind, "9.0")
    for ends in ENDS:
        ends = [e * m // 23 for e in ends]
        offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        whole = matmul.grouped_mm(a, w.mT, offs, tf32)
        for g, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            same(whole[begin:end], matmul.mm(a[begin:end], w[g].t(), tf32))
        assert not whole[ends[-1] :].any()
        for s in chosen[:3] if INTERPRET else chosen:
            same(matmul.grouped_mm(a, w.mT, offs.long(), tf32, chosen=s), whole)
        for view in views(a):
            same(matmul.grouped_mm(view, w.mT, offs, tf32), whole)
        same(matmul.grouped_mm(a, w.mT.contiguous(), offs, tf32), whole)
        poisoned = a.clone()
        poisoned[0], poisoned[2] = NAN, INF
        same(matmul.grouped_mm(poisoned, w.mT, offs, tf32)[3:], whole[3:])


@law
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_is_a_stable_sort(dtype):
    for rows, n in ((5, 8), (3, 129), (2, 300)) if INTERPRET else ((5, 8), (300, 129), (17, 5000)):
        x = randn(rows, n, dtype=dtype).mul(2).round()
        flat = x.view(-1)
        flat[::7], flat[3::11], flat[5::13], flat[::5] = NAN, INF, -INF, -0.0
        for largest in (True, False):
            wanted = torch.sort(x, dim=1, descending=largest, stable=True)
            for k in (1, 2, 8):
                first = tuple(t[:, :k].contiguous() for t in wanted)
                same(sort.topk(x, k, 1, largest), first)
                for view in views(x):
                    same(sort.topk(view, k, 1, largest), first)
                same(sort.topk(x.t(), k, 0, largest), tuple(t.t().contiguous() for t in first))
            same(sort.topk(x, n, 1, largest), tuple(wanted))
    whole = torch.arange(6, device=DEVICE)
    same(sort.topk(whole, 2, 0, True), (whole[4:].flip(0), whole[4:].flip(0)))
