"""The laws of the Triton kernels of matmul."""

from types import SimpleNamespace

import numpy
import pytest
import torch
from triton_set_up import (
    BATCHES,
    DEVICE,
    DTYPES,
    FULL,
    HALF,
    INF,
    INTERPRET,
    NAN,
    law,
    no_worse,
    randn,
    real_dot,
    same,
    views,
)

from bicompile.kernels.attention import gpu as attention
from bicompile.kernels.common.room import empty_with_room, rows_that_fit
from bicompile.kernels.matmul import gpu as matmul
from bicompile.kernels.matmul.table import schedules
from bicompile.kernels.norm import gpu as norm

KINDS = (
    ("half", DTYPES[0], False),
    ("double", FULL, False),
    ("ieee", FULL, False),
    ("tf32", FULL, True),
)
if not INTERPRET:
    KINDS += (("half", torch.float16, False),)
SHAPES = ((20, 70, 33), (20, 72, 40))
if not INTERPRET:
    SHAPES += ((600, 576, 320), (300, 70, 33), (129, 1000, 257))


@law
@pytest.mark.parametrize("m,k,n", SHAPES)
@pytest.mark.parametrize("kind,dtype,tf32", KINDS)
def test_matmul_rows_and_schedules(kind, dtype, tf32, m, k, n):
    a, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    whole = matmul.mm(a, w.t(), tf32)
    for count in BATCHES + ((19,) if INTERPRET else (33, 64, 65, 128, 129, 256)):
        same(matmul.mm(a[:count], w.t(), tf32), whole[:count])
        start = min(count, m - 1)
        same(matmul.mm(a[start : start + 1], w.t(), tf32), whole[start : start + 1])
    for view in views(a):
        same(matmul.mm(view, w.t(), tf32), whole)
        same(matmul.mm(view[3:5], w.t(), tf32), whole[3:5])
    for view in views(w):
        same(matmul.mm(a[:7], view.t(), tf32), whole[:7])
    poisoned = a.clone()
    poisoned[0], poisoned[2] = NAN, INF
    same(matmul.mm(poisoned, w.t(), tf32)[3:], whole[3:])
    for s in schedules(kind, "9.0"):
        same(matmul.mm(a, w.t(), tf32, chosen=s), whole)
    same(matmul.mm(a, w[5:9].t(), tf32), whole[:, 5:9])


@law
@pytest.mark.parametrize("count", [1, 5, 17, 40])
def test_rows_in_the_memory_behind_an_operand_change_no_bit(count):
    """Whole tiles are read where memory allows it, whatever stands there."""
    a, w = randn(count, 72, dtype=HALF), randn(40, 72, dtype=HALF, seed=1)
    behind = torch.full((count + 63, 80), NAN, dtype=HALF, device=DEVICE)[:count, :72]
    behind.copy_(a)
    assert rows_that_fit(a) == count < rows_that_fit(behind)
    assert rows_that_fit(behind[count - 1 :]) == 16
    for s in schedules("half", "9.0"):
        same(matmul.mm(behind, w.t(), False, chosen=s), matmul.mm(a, w.t(), False, chosen=s))
    product = matmul.swiglu(behind, w.t(), w.t(), False)
    same(product, matmul.swiglu(a, w.t(), w.t(), False))
    assert rows_that_fit(product) > count and product.is_contiguous()


@law
def test_results_that_a_product_reads_have_room():
    """The heads of few queries side by side, as a model hands them to a product."""
    q, k = randn(3, 2, 5, 16, dtype=HALF), randn(3, 2, 7, 16, dtype=HALF)
    heads = attention.sdpa(q, k, k, None, False, 0.25).transpose(1, 2)
    assert heads.is_contiguous() and rows_that_fit(heads.reshape(15, 32)) == 16
    normed = norm.rms_norm(q, 1, None, 0.0, 0.0, False), norm.layer_norm(q, 1, None, None, 0.0)[0]
    for result in normed:
        assert result.is_contiguous() and rows_that_fit(result.view(30, 16)) == 64
    assert rows_that_fit(empty_with_room(65, 8, dtype=HALF, device=q.device)) == 65


@law
@pytest.mark.parametrize("columns", [(72, 24, 40), (24, 40, 16), (33, 24, 24)])
def test_q_k_v_are_three_products(columns):
    """By every schedule, wherever the three lie; the last columns are too few for descriptors."""
    a = randn(37, 136, dtype=HALF)
    whole = randn(sum(columns) + 8, 136, dtype=HALF)
    _, *parts = whole.split((8, *columns))
    apart = [part.clone() for part in parts]
    bias = [randn(n, dtype=HALF, seed=n) for n in columns]
    for rows in (a[3:20], a[:1].clone()):
        plain = tuple(matmul.mm(rows, w.t(), False) for w in parts)
        for s in schedules("half", "9.0"):
            three = (w.t() for w in apart)
            same(matmul.qkv_proj(rows, *three, None, None, None, False, s), plain)
    three = [w.t() for w in parts]
    added = tuple(matmul.addmm(b, a, w, 1, 1, False) for b, w in zip(bias, three, strict=True))
    same(matmul.qkv_proj(a, *three, *bias, False), added)
    turned = a.t().contiguous().t()
    blocks = next(s for s in schedules("half", "9.0") if s.tma and s.serves_several(16))
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 0, 1), (1, 1, 1)):
        three = [parts[i].t() for i in order]
        wanted = tuple(matmul.mm(a, w, False) for w in three)
        for left in (a, turned):
            same(matmul.qkv_proj(left, *three, None, None, None, False, blocks), wanted)


def test_weights_that_are_far_apart_have_no_common_descriptor():
    """The steps of one have 40 bits."""
    at = [SimpleNamespace(data_ptr=lambda where=where: where) for where in (0, 1 << 39, 1 << 40)]
    assert matmul._are_near(at[:2]) and not matmul._are_near(at)


@law
def test_every_schedule_is_one_chain():
    """Sums of 0 are what was rounded away: where a chain is cut, in any column, shows."""
    large, w = randn(20, 136, dtype=HALF), randn(104, 136, dtype=HALF)
    x, w = torch.cat([large, -large], 1), torch.cat([w, w], 1)
    for kind in ("half", "half pair"):
        found = schedules(kind, "9.0")
        assert any(s.columns[1] for s in found)
        for s in found:
            if kind == "half":
                same(matmul.mm(x, w.t(), False, s), matmul.mm(x, w.t(), False))
            else:
                call = x, w.t(), w.t(), False
                same(matmul.swiglu(*call, s), matmul.swiglu(*call))


@law
@pytest.mark.parametrize("kind,dtype,tf32", KINDS)
def test_every_spelling_of_a_matmul(kind, dtype, tf32):
    a, b = randn(3, 9, 40, dtype=dtype), randn(3, 40, 17, dtype=dtype, seed=1)
    whole = matmul.bmm(a, b, tf32)
    for i in range(3):
        same(matmul.mm(a[i], b[i], tf32), whole[i])
    same(matmul.bmm(a[1:2], b[1:2], tf32)[0], whole[1])
    same(matmul.bmm(a, b[:1].expand(3, 40, 17), tf32)[0], whole[0])
    bias, nan = randn(17, dtype=dtype, seed=2), torch.full((1, 9, 1), NAN, device=DEVICE)
    same(matmul.baddbmm(nan.to(dtype), a, b, 0, 1, tf32), whole)
    same(matmul.addmm(bias * NAN, a[0], b[0], 0.0, 1.0, tf32), whole[0])
    exact = matmul.mm(a[0], b[0], tf32) if dtype == FULL else None
    if exact is not None:
        same(matmul.addmm(bias, a[0], b[0], 0.5, 2.0, tf32), exact * 2.0 + bias * 0.5)
        same(matmul.addmm(bias, a[0], b[0], 1, 1, tf32), exact + bias)
    same(matmul.baddbmm(bias, a, b, 1.0, 1.0, tf32)[2],
         matmul.addmm(bias, a[2], b[2], 1.0, 1.0, tf32))  # fmt: skip
    zero = matmul.addmm(bias, a[0][:, :0], b[0][:0], 1.0, 1.0, tf32)
    same(zero, bias.expand(9, 17))
    assert matmul.mm(a[0][:0], b[0], tf32).shape == (0, 17)
    assert matmul.bmm(a[:0], b[:0], tf32).shape == (0, 9, 17)


@law
@real_dot
@pytest.mark.parametrize("kind,dtype,tf32", KINDS)
def test_matmul_accuracy(kind, dtype, tf32):
    m, k, n = (9, 200, 17) if INTERPRET else (257, 4096, 300)
    a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype, seed=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        exact = a.double().cpu() @ b.double().cpu()
        bias = randn(n, dtype=dtype, seed=2)
        no_worse(matmul.mm(a, b, tf32), a @ b, exact)
        ours = matmul.addmm(bias, a, b, 1, 1, tf32)
        no_worse(ours, torch.addmm(bias, a, b), exact + bias.double().cpu())
    finally:
        torch.set_float32_matmul_precision(before)


@law
@pytest.mark.parametrize("kind,dtype,tf32", KINDS)
def test_fused_products_round_as_their_ops(kind, dtype, tf32):
    a, other = randn(9, 40, dtype=dtype), randn(9, 17, dtype=dtype, seed=3)
    q, k, v = (randn(40, 17, dtype=dtype, seed=i) for i in range(3))
    bias = randn(17, dtype=dtype, seed=4)
    product = matmul.mm(a, q, tf32)
    same(matmul.mm_add(a, q, other, tf32), product + other)
    wanted = tuple(matmul.mm(a, w, tf32) for w in (q, k, v))
    same(matmul.qkv_proj(a, q, k, v, None, None, None, tf32), wanted)
    wanted = tuple(matmul.addmm(bias, a, w, 1.0, 1.0, tf32) for w in (q, k, v))
    same(matmul.qkv_proj(a, q, k, v, bias, bias, bias, tf32), wanted)
    if INTERPRET:  # whose exponential is NumPy's
        gate = product.float()
        silu = (gate / (torch.from_numpy(numpy.exp(-gate.numpy())) + 1.0)).to(dtype)
        same(matmul.swiglu(a, q, k, tf32), silu * matmul.mm(a, k, tf32))
