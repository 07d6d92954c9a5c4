"""The Triton kernels and their laws: on an NVIDIA GPU (`pytest -m gpu`), and in the interpreter.

In the interpreter a dot is replaced by one fp32 chain over K, which is the order that the laws
assume of the hardware; so equal bits there show the structure, and on the GPU they show the rest.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"

if INTERPRET or torch.cuda.is_available():
    from bicompile.kernels.attention import gpu as attention
    from bicompile.kernels.attention import schedules as attention_schedules
    from bicompile.kernels.common.trees import row_shape
    from bicompile.kernels.matmul import gpu as matmul
    from bicompile.kernels.matmul import schedules as matmul_schedules
    from bicompile.kernels.norm import gpu as norm
    from bicompile.kernels.reduce import gpu as reduce
    from bicompile.kernels.reduce import schedules as reduce_schedules
    from bicompile.kernels.softmax import gpu as softmax

if INTERPRET:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    np.seterr(all="ignore")

    def _floats(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def _chain(self, a, b, acc, *rest):
        x, y = _floats(a).astype(np.float64), _floats(b).astype(np.float64)
        total = acc.data.astype(np.float32)
        for k in range(x.shape[-1]):
            total = (total + x[..., :, k, None] * y[..., k, None, :]).astype(np.float32)
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _chain

on_device = [] if INTERPRET else [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]  # fmt: skip
HALF, FULL = torch.bfloat16, torch.float32
DTYPES = (torch.float16, FULL) if INTERPRET else (HALF, torch.float16, FULL)
INF, NAN = math.inf, math.nan


def law(test):
    """A test for the device, or for the interpreter inside `test_in_the_interpreter`."""
    for mark in on_device:
        test = mark(test)
    return test


real_dot = pytest.mark.skipif(INTERPRET, reason="the interpreter's dot is a stand-in")


@pytest.mark.skipif(INTERPRET, reason="this is the inner run")
def test_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def randn(*shape, dtype=FULL, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def bits(x):
    x = x.contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a, b):
    """Equal bits, in every tensor of a result."""
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        different = bits(x) != bits(y)
        assert not different.any(), f"{int(different.sum())} of {x.numel()} elements differ"


def rows(result, index):
    return tuple(x[index] for x in result) if isinstance(result, tuple) else result[index]


def views(x):
    """The same values behind other strides and alignments."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    yield flat.view(x.shape).copy_(x)
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), NAN, dtype=x.dtype, device=x.device)
    yield wide[..., 1:-2].copy_(x)
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)


def no_worse(ours, theirs, exact):
    """Root mean square error against float64; under half a unit in the last place is luck."""
    error = [float((r.double() - exact).pow(2).mean().sqrt()) for r in (ours.cpu(), theirs.cpu())]
    unit = float(exact.abs().mean()) * torch.finfo(ours.dtype).eps / 2
    assert error[0] <= 1.25 * error[1] + unit, error
    return error


# ---- rows: reduce, softmax, norm -------------------------------------------------------------


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
    "log_softmax": lambda x, **s: softmax.log_softmax(x, 1, FULL, **s),
    "layer_norm": lambda x, **s: norm.layer_norm(x, 1, *_weights(x), 1e-5, **s),
    "rms_norm": lambda x, **s: norm.rms_norm(x, 1, _weights(x)[0], 1e-6, 0.0, True, **s),
    "rms_norm_offset": lambda x, **s: norm.rms_norm(x, 1, _weights(x)[0], 1e-6, 1.0, False, **s),
}
ROW_SIZES = (7, 300, 4100) if INTERPRET else (1, 5, 33, 256, 576, 1000, 4096, 4097, 12289)
BATCHES = (2,) if INTERPRET else (1, 2, 3, 5, 8, 17, 32)
ROW_COUNT = 5 if INTERPRET else 33


@law
@pytest.mark.parametrize("k", ROW_SIZES)
@pytest.mark.parametrize("op", ROW_OPS)
def test_a_row_does_not_see_its_batch(op, k):
    if INTERPRET and k > 300 and op not in ("sum", "var_mean", "softmax", "layer_norm"):
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
        for s in reduce_schedules.schedules(k, block):
            same(f(x, chosen=s), whole)


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
    return torch.from_numpy(1 / np.sqrt(x.numpy()))


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (50, 4100) if INTERPRET else (50, 1000, 5000, 50257))
def test_row_accuracy(k, dtype):
    x = randn(16, k, dtype=dtype)
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
    no_worse(softmax.log_softmax(x, 1, dtype), x.log_softmax(1), d.log_softmax(1))
    y = norm.layer_norm(x, 1, w, w, 1e-5)[0]
    no_worse(y, f.layer_norm(x, (k,), w, w), f.layer_norm(d, (k,), wd, wd))
    y = norm.rms_norm(x, 1, w, 1e-6, 0.0, False)
    no_worse(y, f.rms_norm(x, (k,), w, 1e-6), unit * wd)


# ---- matmul ----------------------------------------------------------------------------------

KINDS = (("half", DTYPES[0], False), ("ieee", FULL, False), ("tf32", FULL, True))
if not INTERPRET:
    KINDS += (("half", torch.float16, False),)
SHAPES = ((20, 70, 33),) if INTERPRET else ((600, 576, 320), (300, 70, 33), (129, 1000, 257))


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
    for s in matmul_schedules.schedules(kind):
        same(matmul.mm(a, w.t(), tf32, chosen=s), whole)
    same(matmul.mm(a, w[5:9].t(), tf32), whole[:, 5:9])


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


# ---- attention -------------------------------------------------------------------------------

LONG = 60 if INTERPRET else 1300
if INTERPRET:
    attention.CHUNK, attention.TILE, attention.MERGE_ROWS = 32, {2: 16, 4: 16}, 128


def _qkv(b, h, hkv, q, s, d, dv, dtype):
    return (
        randn(b, h, q, d, dtype=dtype),
        randn(b, hkv, s, d, dtype=dtype, seed=1),
        randn(b, hkv, s, dv, dtype=dtype, seed=2),
    )


def sdpa(q, k, v, mask=None, causal=False, dtype=FULL, **options):
    """In fp32, before the one rounding: halves would hide most differences."""
    scale = q.shape[-1] ** -0.5
    return attention.sdpa(q, k, v, mask, causal, scale, dtype=dtype, **options)


def _causal(q, s, past=0):
    return torch.ones(q, s, dtype=torch.bool, device=DEVICE).tril(past)


HEADS = ((3, 1, 20, 24),) if INTERPRET else (
    (8, 2, 64, 64), (9, 3, 64, 64), (8, 8, 128, 128), (4, 1, 80, 96), (2, 2, 256, 256),
)  # fmt: skip
HEAD_SIZES = {24: 64, 64: 64, 96: 128, 128: 128, 256: 256}  # head -> column of the table
SOME = {HALF: HEADS, torch.float16: HEADS[:1], FULL: () if INTERPRET else HEADS[:1] + HEADS[2:4]}
attention_case = pytest.mark.parametrize(
    "dtype,h,hkv,d,dv", [(dtype, *heads) for dtype in DTYPES for heads in SOME[dtype]]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@law
@attention_case
def test_attention_spellings_and_schedules(dtype, h, hkv, d, dv):
    n = LONG // 2
    q, k, v = _qkv(2, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    assert whole.transpose(1, 2).is_contiguous()
    mask = _causal(n, n)
    same(sdpa(q, k, v, mask), whole)
    same(sdpa(q, k, v, mask.expand(2, h, n, n).contiguous()), whole)
    same(sdpa(q, k, v, torch.zeros(n, n, device=DEVICE).masked_fill(~mask, -INF)), whole)
    g = h // hkv
    same(sdpa(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), causal=True), whole)
    same(sdpa(q[1:], k[1:], v[1:], causal=True), whole[1:])
    for s in attention_schedules.schedules(q.element_size(), HEAD_SIZES[max(d, dv)]):
        for split in (False, True):
            same(sdpa(q, k, v, causal=True, chosen=s, split=split), whole)
            same(sdpa(q, k, v, mask, chosen=s, split=split), whole)
    for a, b, c in zip(views(q), views(k), views(v), strict=True):
        same(sdpa(a, b, c, causal=True), whole)
        same(sdpa(a, b, c, mask), whole)


@law
@attention_case
def test_attention_prefill_chunks_and_decode(dtype, h, hkv, d, dv):
    n = LONG
    q, k, v = _qkv(1, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    for past, count in ((n - 1, 1), (n // 2 + 3, 1), (n // 3, 5), (n // 4 + 1, n // 2)):
        part, end = q[:, :, past : past + count], past + count
        want = whole[:, :, past : past + count]
        mask = _causal(count, end, past)
        same(sdpa(part, k[:, :, :end], v[:, :, :end], mask), want)
        cache = torch.full((2, 1, hkv, n + 77, max(d, dv)), NAN, dtype=dtype, device=DEVICE)
        keys, values = cache[0, ..., :d], cache[1, ..., :dv]
        keys[:, :, :end], values[:, :, :end] = k[:, :, :end], v[:, :, :end]
        for split in (False, True):
            padded = torch.nn.functional.pad(mask, (0, n + 77 - end))
            same(sdpa(part, keys, values, padded, split=split), want)
        if count == 1:
            same(sdpa(part, k[:, :, :end], v[:, :, :end]), want)


@law
@attention_case
def test_masked_keys_are_absent(dtype, h, hkv, d, dv):
    n = 40 if INTERPRET else 600
    q, k, v = _qkv(2, h, hkv, n, n, d, dv, dtype)
    whole = sdpa(q, k, v, causal=True)
    for left in (1, 33) if INTERPRET else (1, 64, 130):

        def padded(x, fill, left=left):
            y = torch.full((2, hkv, left + n + 3, x.shape[-1]), fill, dtype=dtype, device=DEVICE)
            y[0, :, left : left + n], y[1, :, :n] = x[0], x[1]
            return y

        mask = torch.zeros(2, 1, n, left + n + 3, dtype=torch.bool, device=DEVICE)
        mask[0, 0, :, left : left + n], mask[1, 0, :, :n] = _causal(n, n), _causal(n, n)
        for fill in (NAN, INF):
            same(sdpa(q, padded(k, fill), padded(v, fill), mask), whole)
            some = slice(n - 2, n)
            got = sdpa(q[:, :, some], padded(k, fill), padded(v, fill), mask[:, :, some])
            same(got, whole[:, :, some])
    blind = mask.clone()
    blind[:, :, 5] = False
    seen = sdpa(q, padded(k, NAN), padded(v, NAN), blind)
    assert (seen[:, :, 5] == 0).all()
    same(seen[:, :, 6:], whole[:, :, 6:])


@law
@each_dtype
def test_values_that_are_not_finite_reach_who_sees_them(dtype):
    n = 40 if INTERPRET else 200
    q, k, v = _qkv(1, 2, 1, n, n, 32, 32, dtype)
    whole, at = sdpa(q, k, v, causal=True), n - 7
    bad = v.clone()
    bad[:, :, at, 0], bad[:, :, at, 1], bad[:, :, at, 2] = NAN, INF, -INF
    bad[:, :, at + 1, 2] = INF
    got = sdpa(q, k, bad, causal=True)
    same(got[:, :, :at], whole[:, :, :at])
    same(got[..., 3:], whole[..., 3:])
    assert got[:, :, at:, 0].isnan().all() and got[:, :, at + 1 :, 2].isnan().all()
    assert (got[:, :, at:, 1] == INF).all() and (got[:, :, at, 2] == -INF).all()
    same(sdpa(q[:, :, at:], k, bad, _causal(n, n)[at:]), got[:, :, at:])
    same(sdpa(q[:, :, -1:], k, bad), got[:, :, -1:])


@law
@each_dtype
def test_attention_masks_of_any_form(dtype):
    b, h, n, s = 2, 4, 9, LONG // 2
    q, k, v = _qkv(b, h, 2, n, s, 32, 32, dtype)
    generator = torch.Generator().manual_seed(0)
    ragged = (torch.rand(b, 1, n, s, generator=generator) < 0.3).to(DEVICE)
    ragged[0, 0, 2], ragged[..., 3] = False, True
    ragged[0, 0, 2] = False
    whole = sdpa(q, k, v, ragged)
    same(sdpa(q, k, v, ragged, split=True), whole)
    bias = torch.zeros(b, 1, n, s, device=DEVICE).masked_fill(~ragged, -INF)
    same(sdpa(q, k, v, bias), whole)
    same(sdpa(q, k, v, bias.to(HALF)), whole)
    for i in range(b):
        same(sdpa(q[i : i + 1], k[i : i + 1], v[i : i + 1], ragged[i]), whole[i : i + 1])
    alibi = randn(1, h, 1, s)
    same(sdpa(q, k, v, alibi), sdpa(q, k, v, alibi.expand(b, h, n, s).contiguous()))
    per_key = ragged[:, :, :1]
    same(sdpa(q, k, v, per_key), sdpa(q, k, v, per_key.expand(b, h, n, s).contiguous()))
    for mask in (ragged, bias, alibi, per_key):
        exact = _exact(q, k, v, mask)
        torch.testing.assert_close(sdpa(q, k, v, mask).double().cpu(), exact, rtol=2e-2, atol=2e-2)
    assert (sdpa(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert sdpa(q[:, :, :0], k, v).shape == (b, h, 0, 32)
    same(attention.sdpa(q, k, v, None, False, -0.3), attention.sdpa(-q, k, v, None, False, 0.3))
    rounded = sdpa(q, k, v, ragged, dtype=None)
    assert rounded.dtype == dtype
    same(rounded, whole.to(dtype))


def _exact(q, k, v, mask=None):
    g = q.shape[1] // k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    s = q @ k.repeat_interleave(g, 1).mT * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask.cpu()
        s = s.masked_fill(~mask, -INF) if mask.dtype == torch.bool else s + mask.double()
    return s.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(g, 1)


@law
@real_dot
@each_dtype
def test_attention_accuracy(dtype):
    n = 100 if INTERPRET else 1000
    q, k, v = _qkv(2, 4, 4, n, n, 64, 64, dtype)
    for causal in (False, True):
        exact = _exact(q, k, v, _causal(n, n) if causal else None)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        no_worse(sdpa(q, k, v, causal=causal, dtype=dtype), theirs, exact)
