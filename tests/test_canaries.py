"""Planted variants that the same properties must catch: a property that misses one is too weak.

Each canary is wrong in one way that real kernels were, and right in its values.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bicompile import registry, testing
from bicompile.testing.contents import CONTENTS

KERNELS = registry.load_all()


def lanes_sum(x, lanes=16):
    """Sum of the last axis with element k in lane k mod `lanes`, lanes folded by halves."""
    pad = -x.shape[-1] % lanes
    parts = F.pad(x.float(), (0, pad)).unflatten(-1, (-1, lanes))
    acc = torch.zeros_like(parts[..., 0, :])
    for step in parts.unbind(-2):
        acc = acc + step
    while acc.shape[-1] > 1:
        half = acc.shape[-1] // 2
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def product(a, b, lanes=16):
    return lanes_sum(a.float().unsqueeze(-2) * b.float().mT.unsqueeze(-3), lanes).to(a.dtype)


def honest_mm(a, b, tf32):
    return product(a, b)


def honest_sum(x, dim, keepdim, dtype):
    return lanes_sum(x.movedim(dim[0], -1)).to(dtype)


CANARIES = []


def canary(name, **sizes):
    def add(variant):
        CANARIES.append(pytest.param(KERNELS[name], variant, sizes, id=variant.__name__))
        return variant

    return add


@canary("mm", M=9, N=5, K=300)
def splits_k_when_rows_are_few(a, b, tf32):
    if len(a) > 4:
        return product(a, b)
    half = a.shape[1] // 2
    return product(a[:, :half], b[:half]) + product(a[:, half:], b[half:])


@canary("mm", M=9, N=5, K=300)
def tile_of_k_follows_m(a, b, tf32):
    return product(a, b, lanes=8 if len(a) < 8 else 16)


@canary("mm", M=16, N=64, K=301)
def library_matmul(a, b, tf32):
    return torch.mm(a, b)


@canary("mm", M=9, N=5, K=300)
def last_row_runs_another_body(a, b, tf32):
    return torch.cat([product(a[:-1], b), product(a[-1:], b, lanes=4)])


@canary("mm", M=9, N=5, K=300)
def strided_input_runs_another_body(a, b, tf32):
    return product(a, b, lanes=16 if a.is_contiguous() else 8)


@canary("mm", M=9, N=5, K=300)
def misaligned_input_runs_another_body(a, b, tf32):
    return product(a, b, lanes=16 if a.storage_offset() % 4 == 0 else 32)


@canary("mm", M=9, N=5, K=300)
def reads_its_neighbours(a, b, tf32):
    return product(a, b) + 0.0 * a.sum()


@canary("mm", M=9, N=5, K=300)
def order_follows_the_number_of_threads(a, b, tf32):
    return product(a, b, lanes=torch.get_num_threads() * 4)


@canary("mm", M=9, N=5, K=300)
def order_follows_the_run(a, b, tf32):
    order = torch.randperm(a.shape[1])
    return product(a[:, order], b[order])


@canary("mm", M=9, N=33, K=300)
def tail_of_n_runs_another_body(a, b, tf32):
    n = b.shape[1] // 8 * 8
    return torch.cat([product(a, b[:, :n]), product(a, b[:, n:], lanes=4)], 1)


@canary("bmm", B=4, M=3, N=5, K=300)
def batch_of_one_is_another_op(a, b, tf32):
    return product(a, b, lanes=8 if len(a) == 1 else 16)


@canary("addmm", M=9, N=5, K=300)
def bias_is_rounded_twice_for_one_row(c, a, b, beta, alpha, tf32):
    acc = alpha * lanes_sum(a.float().unsqueeze(-2) * b.float().mT)
    if len(a) == 1:
        acc = acc.bfloat16().float()
    return (acc + beta * c.float()).to(a.dtype)


@canary("sum", M=33, K=1025)
def splits_the_row_when_rows_are_few(x, dim, keepdim, dtype):
    x = x.movedim(dim[0], -1)
    if x.numel() // x.shape[-1] > 8:
        return lanes_sum(x).to(dtype)
    return sum(lanes_sum(part) for part in x.chunk(4, -1)).to(dtype)


@canary("sum", M=33, K=1025)
def library_sum(x, dim, keepdim, dtype):
    return x.sum(dim)


@canary("sum", M=33, K=1025)
def adds_with_atomics(x, dim, keepdim, dtype):
    x = x.movedim(dim[0], -1)
    return lanes_sum(x[..., torch.randperm(x.shape[-1])]).to(dtype)


@canary("mean", M=33, K=1025)
def pads_with_old_memory(x, dim, keepdim, dtype):
    total = honest_sum(x, dim, keepdim, torch.float32)
    stale = torch.rand(()) * 1e-3
    return ((total + stale) / x.shape[dim[0]]).to(dtype)


@canary("var", M=33, K=129)
def one_pass_for_many_rows(x, dim, correction, keepdim):
    x = x.movedim(dim[0], -1)
    n = x.shape[-1]
    if x.numel() // n < 16:
        mean = lanes_sum(x) / n
        return lanes_sum((x - mean[..., None]).square()) / (n - correction)
    return (lanes_sum(x * x) - lanes_sum(x).square() / n) / (n - correction)


@canary("softmax", M=9, K=129)
def maximum_of_all_rows(x, dim, dtype):
    e = torch.exp(x.float() - x.float().max())
    return (e / e.sum(dim, keepdim=True)).to(dtype)


@canary("softmax_statistics", M=9, K=129)
def tail_uses_another_exponential(x, dim):
    x = x.float()
    rows, top = x.shape[0] // 8 * 8, x.amax(dim, keepdim=True)
    body = torch.exp((x - top)[:rows])
    tail = torch.exp2((x - top)[rows:] * 1.442695)
    return top, lanes_sum(torch.cat([body, tail])).log()[..., None]


@canary("layer_norm", M=9, K=129)
def statistics_of_the_batch(x, n, w, b, eps):
    mean = x.mean(-1, keepdim=True)
    rstd = (x.var(correction=0) + eps).rsqrt().expand_as(mean)
    return (x - mean) * rstd, mean, rstd


@canary("rms_norm", M=33, K=1025)
def warps_follow_the_rows(x, n, w, eps, offset, round_first):
    lanes = 32 if len(x) < 16 else 128
    return x * (lanes_sum(x * x, lanes)[..., None] / x.shape[-1] + eps).rsqrt()


@canary("softmax_backward", M=9, K=129)
def the_sum_of_a_gradient_follows_the_rows(grad, y, dim, dtype):
    total = lanes_sum(grad.float() * y.float(), 8 if len(grad) < 4 else 16)[..., None]
    return ((grad.float() - total) * y.float()).to(dtype)


@canary("layer_norm_backward", M=9, K=129)
def the_first_rows_of_a_gradient_run_another_body(grad, x, n, mean, rstd, w):
    g, x, mean, rstd, w = (t.float() for t in (grad, x, mean, rstd, w))
    g, y = g * w, (x - mean) * rstd

    def body(rows, lanes):
        shift, slope = (lanes_sum(t[rows], lanes)[..., None] / x.shape[-1] for t in (g, g * y))
        return (g[rows] - shift - y[rows] * slope) * rstd[rows]

    return torch.cat([body(slice(4), 16), body(slice(4, None), 8)]).to(grad.dtype)


def attend(q, k, v, mask, causal, scale, *, hide=float("-inf"), total=lanes_sum):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).float() for t in (k, v))
    score = (q.float().unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * scale
    if mask is not None and mask.dtype is torch.bool:
        score = score.masked_fill(~mask, hide)
    elif mask is not None:
        score = score + mask.float()
    p = torch.exp(score - score.amax(-1, keepdim=True)).nan_to_num(0.0)
    out = total(p.unsqueeze(-2) * v.mT.unsqueeze(-3)) / total(p).unsqueeze(-1)
    return out.to(q.dtype)


@canary("sdpa", B=2, H=2, Q=9, S=129, D=16)
def decode_is_another_kernel(q, k, v, mask, causal, scale, *plain):
    lanes = 4 if q.shape[2] == 1 else 16
    return attend(q, k, v, mask, causal, scale, total=lambda t: lanes_sum(t, lanes))


@canary("sdpa", B=3, H=2, Q=9, S=129, D=16)
def splits_of_the_keys_follow_the_batch(q, k, v, mask, causal, scale, *plain):
    lanes = 4 * len(q)
    return attend(q, k, v, mask, causal, scale, total=lambda t: lanes_sum(t, lanes))


@canary("sdpa", B=3, H=2, Q=16, S=129, D=16)
def library_attention(q, k, v, mask, causal, scale, *plain):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


@pytest.mark.parametrize(("kernel", "variant", "sizes"), CANARIES)
def test_canary_is_caught(kernel, variant, sizes):
    case = kernel.contract.cases[0]
    caught = []
    for dtype in (torch.float32, torch.bfloat16):
        sample = testing.make_sample(kernel, case, dtype, sizes)
        for law in testing.kernels.PROPERTIES:
            for seed in range(3):
                try:
                    law(variant, sample, seed=seed)
                except testing.InvarianceViolation:
                    caught.append(law.__name__)
    assert caught, f"no property catches {variant.__name__}"


@pytest.mark.parametrize(
    ("kernel", "honest", "sizes"),
    [
        pytest.param(KERNELS["mm"], honest_mm, {"M": 9, "N": 5, "K": 300}, id="mm"),
        pytest.param(KERNELS["sum"], honest_sum, {"M": 33, "K": 1025}, id="sum"),
    ],
)
def test_an_honest_stand_in_passes(kernel, honest, sizes):
    """The canaries are caught for their fault, not for being written in Python."""
    sample = testing.make_sample(kernel, kernel.contract.cases[0], torch.float32, sizes)
    for law in testing.kernels.PROPERTIES:
        law(honest, sample)


def test_there_are_enough_canaries():
    assert len(CANARIES) >= 20


def in_double(x, lanes):
    """`lanes_sum` in double."""
    parts = F.pad(x.double(), (0, -x.shape[-1] % lanes)).unflatten(-1, (-1, lanes))
    acc = torch.zeros_like(parts[..., 0, :])
    for step in parts.unbind(-2):
        acc = acc + step
    return acc.sum(-1).float()


def test_the_order_of_sums_in_double_is_seen():
    """Ordinary numbers may hide it behind the rounding to float32; terms that cancel do not."""

    def lanes_follow_the_rows(x, dim, keepdim, dtype):
        return in_double(x.movedim(dim[0], -1), 16 if len(x) > 3 else 8).to(dtype)

    kernel = KERNELS["sum"]
    seen = set()
    for contents in ("mixed", "cancelling"):
        sample = testing.make_sample(
            kernel, kernel.contract.cases[0], torch.float32, {"M": 9, "K": 300}, contents=contents
        )
        try:
            testing.rows_do_not_depend_on_the_batch(lanes_follow_the_rows, sample)
        except testing.InvarianceViolation:
            seen.add(contents)
    assert "cancelling" in seen


@pytest.mark.parametrize("contents", CONTENTS)
def test_contents_fit_every_shape(contents):
    generator = torch.Generator().manual_seed(0)
    for shape, axis in (([3, 40], 1), ([0, 5], 1), ([4, 2], 1), ([7], None), ([33, 2], 0)):
        x = CONTENTS[contents](shape, axis, generator)
        assert [*x.shape] == shape and x.dtype is torch.float32 and not x.isnan().any()
