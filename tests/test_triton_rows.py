"""The laws of the Triton kernels of reduce, softmax and norm."""

import math

import numpy
import pytest
import torch
from triton_set_up import (
    BATCHES,
    DEVICE,
    DTYPES,
    FULL,
    INF,
    INTERPRET,
    NAN,
    law,
    no_worse,
    randn,
    rows,
    same,
    views,
)

from bicompile import registry, testing
from bicompile.kernels.common.trees import row_shape
from bicompile.kernels.norm import gpu as norm
from bicompile.kernels.reduce import gpu as reduce
from bicompile.kernels.reduce import parts
from bicompile.kernels.reduce import table as reduce_table
from bicompile.kernels.softmax import gpu as softmax


def _weights(x):
    k = x.shape[-1]
    return randn(k, dtype=x.dtype, seed=1), randn(k, dtype=x.dtype, seed=2)


ROW_OPS = {
    "sum": lambda x, **s: reduce.sum(x, [1], False, x.dtype, **s),
    "sum_fp32": lambda x, **s: reduce.sum(x, [1], True, FULL, **s),
    "mean": lambda x, **s: reduce.mean(x, [1], False, FULL, **s),
    "prod": lambda x, **s: reduce.prod(x, [1], False, FULL, **s),
    "std": lambda x, **s: reduce.std(x, [1], 0.0, False, **s),
    "var_mean": lambda x, **s: reduce.var_mean(x, [1], 1.0, True, **s),
    "logsumexp": lambda x, **s: reduce.logsumexp(x, [1], False, **s),
    **{
        f"norm_{p}": lambda x, p=p, **s: reduce.norm(x, p, [1], False, FULL, **s)
        for p in (0.0, 1.0, 2.0, 3.5, INF, -INF)
    },
    "softmax": lambda x, **s: softmax.softmax(x, 1, x.dtype, **s),
    "softmax_statistics": lambda x, **s: torch.cat(softmax.softmax_statistics(x, 1, **s), 1),
    "layer_norm": lambda x, **s: norm.layer_norm(x, 1, *_weights(x), 1e-5, **s),
    "rms_norm": lambda x, **s: norm.rms_norm(x, 1, _weights(x)[0], 1e-6, 0.0, True, **s),
    "rms_norm_offset": lambda x, **s: norm.rms_norm(x, 1, _weights(x)[0], 1e-6, 1.0, False, **s),
    "softmax_backward": lambda x, **s: softmax.softmax_backward(x, x * 0.5, 1, x.dtype, **s),
    "layer_norm_backward": lambda x, **s: norm.layer_norm_backward(
        x, x * x, 1, x[:, :1], x[:, -1:], _weights(x)[0], **s
    ),
    "rms_norm_backward": lambda x, **s: norm.layer_norm_backward(
        x, x * x, 1, None, x[:, -1:], None, **s
    ),
}
NORMS = [op for op in ROW_OPS if op.startswith(("layer_norm", "rms_norm"))]  # rows are whole
ROW_SIZES = (7, 300, 4100) if INTERPRET else (1, 5, 33, 256, 576, 1000, 4096, 4097, 12289)
REPRESENTATIVES = ("sum", "var_mean", "softmax", "layer_norm", "layer_norm_backward")
ROW_COUNT = 5 if INTERPRET else 33


@law
@pytest.mark.parametrize("k", ROW_SIZES)
@pytest.mark.parametrize("op", ROW_OPS)
def test_a_row_does_not_see_its_batch(op, k):
    if INTERPRET and k > 300 and op not in REPRESENTATIVES:
        pytest.skip("one of each kind is enough for the slow interpreter")
    for dtype in DTYPES[1:] if INTERPRET else DTYPES:
        f, x = ROW_OPS[op], randn(ROW_COUNT, k, dtype=dtype)
        whole = f(x)
        for n in BATCHES:
            same(f(x[:n]), rows(whole, slice(n)))
            same(f(x[n : n + 1]), rows(whole, slice(n, n + 1)))
        for view in views(x):
            same(f(view), whole)
            same(f(view[1:2]), rows(whole, slice(1, 2)))
        poisoned = x.clone()
        poisoned[0], poisoned[2], poisoned[4] = NAN, INF, -INF
        keep = [i for i in range(ROW_COUNT) if i not in (0, 2, 4)]
        same(rows(f(poisoned), keep), rows(whole, keep))
        block = math.prod(row_shape(k))
        for s in reduce_table.schedules(k, block, cut=op not in NORMS):
            same(f(x, chosen=s), whole)


@law
@pytest.mark.parametrize("k", (4097, 9000) if INTERPRET else (4097, 9000, 40000, 151936, 270000))
@pytest.mark.parametrize("op", [op for op in ROW_OPS if op not in NORMS])
def test_rows_in_parts(op, k):
    """Programs that share a row give the bits of one that has it for itself."""
    if INTERPRET and k == 4097 and op not in REPRESENTATIVES:
        pytest.skip("one of each kind is enough for the slow interpreter")
    x = randn(5, k + 3)[:, 1:-2]
    x[1, 4096], x[2, 7], x[3, 0], x[3, 4095] = NAN, INF, -INF, INF
    whole = ROW_OPS[op](x, chosen=reduce_table.LONG.single)
    for s in reduce_table.PARTS:
        same(ROW_OPS[op](x, chosen=s), whole)
        same(ROW_OPS[op](x[4:], chosen=s), rows(whole, slice(4, 5)))
        same(ROW_OPS[op](x.t().contiguous().t(), chosen=s), whole)


@law
def test_nodes_of_very_long_rows(monkeypatch):
    """Of so many blocks that a stage of their own joins them."""
    monkeypatch.setattr(parts, "CHAIN", 1)
    x = randn(3, 9000)
    for op in ("sum", "softmax", "softmax_statistics", "logsumexp", "softmax_backward"):
        f = ROW_OPS[op]
        same(f(x, chosen=reduce_table.PARTS[0]), f(x, chosen=reduce_table.LONG.single))


@law
@pytest.mark.parametrize("op", ROW_OPS)
def test_terms_that_stand_apart(op):
    """Strides of multiples of 16, with which Triton 3.6 has been seen to mix up offsets."""
    for n, k in ((16, 16),) if INTERPRET else ((16, 16), (64, 16), (4096, 8), (64, 32), (256, 640)):
        for dtype in DTYPES:
            x = randn(n, k, dtype=dtype)
            same(ROW_OPS[op](x.t().contiguous().t()), ROW_OPS[op](x))


@law
def test_many_rows_equal_few():
    n = 20 if INTERPRET else 5000
    for k in (3, 70) if INTERPRET else (3, 70, 576, 4096):
        x = randn(n, k)
        for op in ("sum", "var_mean", "softmax", "rms_norm", "layer_norm"):
            same(rows(ROW_OPS[op](x), slice(7, 12)), ROW_OPS[op](x[7:12]))


@law
def test_axes_are_taken_in_row_major_order():
    x = randn(3, 4, 5, 6)
    for dim in ([0], [1], [0, 2], [1, 3], [0, 1, 2, 3]):
        kept = [d for d in range(4) if d not in dim]
        flat = x.permute(kept + dim).reshape(math.prod(x.shape[d] for d in kept), -1).contiguous()
        want = reduce.sum(flat, [1], False, FULL)
        same(reduce.sum(x, dim, False, FULL).reshape(-1), want)
        same(reduce.sum(x, dim, True, FULL).reshape(-1), want)
    y = softmax.softmax(x, 1, FULL)
    same(y.movedim(1, -1).contiguous(), softmax.softmax(x.movedim(1, -1), 3, FULL))


@law
def test_empty_and_special_rows():
    empty, nothing = randn(2, 0), randn(0, 3)
    results = [f(empty) for n, f in ROW_OPS.items() if n in ("sum", "mean", "prod", "logsumexp")]
    assert [str(r[0].item()) for r in results] == ["0.0", "nan", "1.0", "-inf"]
    for p in (0.0, 1.0, 2.0, 3.0, INF, -INF):
        assert reduce.norm(empty, p, [1], False, FULL).tolist() == [0.0, 0.0]
    for f in ROW_OPS.values():
        f(nothing)
    assert reduce.sum(randn(), [], False, FULL).shape == ()
    x = torch.tensor([[-INF, -INF], [INF, 0.0], [NAN, 0.0]], device=DEVICE)
    assert str(reduce.logsumexp(x, [1], False).tolist()) == "[-inf, inf, nan]"
    assert str(reduce.norm(x, INF, [1], False, FULL).tolist()) == "[inf, inf, nan]"
    torch.testing.assert_close(softmax.softmax(x, 1, FULL), x.softmax(1), equal_nan=True)


def _root(x):
    """What the interpreter computes for rsqrt."""
    return torch.from_numpy(1 / numpy.sqrt(x.numpy()))


@law
@pytest.mark.parametrize("k", (7, 4100) if INTERPRET else (7, 576, 4096, 5120))
def test_rms_norm_is_the_unfused_chain(k):
    for dtype in DTYPES:
        x, w = randn(9, k, dtype=dtype), randn(k, dtype=dtype, seed=3)
        f = x.float()
        root = _root if INTERPRET else torch.rsqrt
        y = f * root(reduce.mean(f * f, [1], True, FULL) + 1e-6)
        same(norm.rms_norm(x, 1, w, 1e-6, 0.0, True), y.to(dtype) * w)
        same(norm.rms_norm(x, 1, w, 1e-6, 1.0, False), (y * (1.0 + w.float())).to(dtype))
        same(norm.rms_norm(x, 1, None, 1e-6, 0.0, True), y.to(dtype))


@law
@pytest.mark.skipif(INTERPRET, reason="compiles for the GPU")
def test_rms_norm_is_what_inductor_makes_of_the_chain():
    @torch.compile(dynamic=False)
    def tail(x, m):
        return x * torch.rsqrt(m + 1e-6)

    x = randn(64, 576)
    same(norm.rms_norm(x, 1, None, 1e-6, 0.0, True), tail(x, reduce.mean(x * x, [1], True, FULL)))


@law
def test_group_norm():
    for shape, groups in (((3, 6, 5, 4), 3), ((2, 8), 4), ((2, 64, 9, 9), 2)):
        x, w, b = randn(*shape), randn(shape[1], seed=1), randn(shape[1], seed=2)
        whole = norm.group_norm(x, w, b, groups, 1e-5)
        same(norm.group_norm(x[1:2], w, b, groups, 1e-5), rows(whole, slice(1, 2)))
        same(norm.group_norm(x.transpose(0, 1).contiguous().transpose(0, 1), w, b, groups, 1e-5),
             whole)  # fmt: skip
        want = torch.nn.functional.group_norm(x.double(), groups, w.double(), b.double())
        torch.testing.assert_close(whole[0].double(), want, rtol=1e-4, atol=1e-5)


@law
def test_gradients_are_those_of_the_reference():
    """Of every op and case of their contracts, with and without weights and means."""
    sizes = {"B": 2, "M": 3, "N": 3, "K": 70, "K1": 5, "K2": 7, "C": 3}
    for name, kernel in registry.load_all().items():
        family = {"softmax": softmax, "norm": norm}.get(kernel.family)
        if family is not None and name.endswith("_backward"):
            for case in kernel.contract.cases:
                for absent in ((), [a.name for a in case.inputs if a.optional]):
                    given = {"absent": tuple(absent), "device": DEVICE}
                    sample = testing.make_sample(kernel, case, FULL, sizes, **given)
                    double = {n: t if t is None else t.double() for n, t in sample.tensors.items()}
                    want = sample.run(kernel.reference, double)
                    found = sample.run(getattr(family, name))
                    scale = want.abs().max()
                    torch.testing.assert_close(found.double() / scale, want / scale)


@law
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (50, 4100) if INTERPRET else (50, 1000, 5000, 50257))
def test_row_accuracy(k, dtype):
    x = randn(8 if INTERPRET else 16, k, dtype=dtype)
    d, w = x.double().cpu(), randn(k, dtype=dtype, seed=3)
    wd, f = w.double().cpu(), torch.nn.functional
    unit = d / (d.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    no_worse(reduce.sum(x, [1], False, FULL), x.sum(1, dtype=FULL), d.sum(1))
    no_worse(reduce.mean(x, [1], False, dtype), x.mean(1), d.mean(1))
    no_worse(reduce.var(x, [1], 1.0, False), x.var(1), d.var(1))
    no_worse(reduce.logsumexp(x, [1], False), x.logsumexp(1), d.logsumexp(1))
    no_worse(reduce.norm(x, 2.0, [1], False, dtype), x.norm(2, 1), d.norm(2, 1))
    no_worse(reduce.norm(x, 3.0, [1], False, dtype), x.norm(3, 1), d.norm(3, 1))
    no_worse(softmax.softmax(x, 1, dtype), x.softmax(1), d.softmax(1))
    top, shift = softmax.softmax_statistics(x, 1)
    no_worse(((x.float() - top) - shift).to(dtype), x.log_softmax(1), d.log_softmax(1))
    y = norm.layer_norm(x, 1, w, w, 1e-5)[0]
    no_worse(y, f.layer_norm(x, (k,), w, w), f.layer_norm(d, (k,), wd, wd))
    y = norm.rms_norm(x, 1, w, 1e-6, 0.0, False)
    no_worse(y, f.rms_norm(x, (k,), w, 1e-6), unit * wd)
