"""RMSNorm and rotary embedding of queries and keys: joined where both fit, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, rewrite, x
from strategies import crossed

from bicompile import registry, testing

OP = registry.load_all()["qk_norm_rope"].op
NORM = registry.load_all()["rms_norm"].op
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def norm(t, w):
    h = t.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(t.dtype)


def rotate_half(t):
    half = t.shape[-1] // 2
    return torch.cat((-t[..., half:], t[..., :half]), dim=-1)


def rotated(t, w, cos, sin):
    n = norm(t, w).transpose(1, 2)
    return (n * cos.unsqueeze(1)) + (rotate_half(n) * sin.unsqueeze(1))


def heads(q, k, wq, wk, cos, sin):
    return rotated(q, wq, cos, sin), rotated(k, wk, cos, sin)


def arguments(dtype, size=32, batch=2, tokens=7, turns=1):
    shapes = [(batch, tokens, 4, size), (batch, tokens, 2, size), (size,), (size,)]
    q, k, wq, wk = (x(*s, dtype=dtype) + i for i, s in enumerate(shapes))
    angle = x(turns, tokens, size)
    return q, k, wq, wk, angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_fused(dtype, turns):
    gm, report, ours, true = rewrite(heads, *arguments(dtype, turns=turns))
    assert (count(gm, OP), count(gm, NORM)) == (1, 0)
    assert sum(str(OP) == d.became for d in report.decisions) == 2
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@crossed(("dtype", "sizes"), DTYPES, [(32, 1), (80, 7), (128, 70)])
def test_no_bit_changes(dtype, sizes, device):
    size, tokens = sizes
    args = [t.to(device) for t in arguments(dtype, size, tokens=tokens)]
    torch._dynamo.reset()
    fused = torch.compile(heads, backend="batch_invariant")(*args)
    torch._dynamo.reset()
    apart = torch.compile(heads, backend="batch_invariant", options={"disable": "fuse"})(*args)
    testing.assert_same_bits(fused, apart, "fused and apart")


def test_a_canary_is_seen():
    """One rounding less than the ops have gives other bits."""
    q, k, wq, wk, cos, sin = arguments(torch.bfloat16)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    ours = OP(q, k, wq, wk, cos, sin, 1e-6, 0.0, True)
    n = norm(q, wq).transpose(1, 2).float()
    wide = (n * cos.float() + rotate_half(n) * sin.float()).bfloat16()
    with pytest.raises(testing.InvarianceViolation):
        testing.assert_same_bits(wide, ours[0], "fewer roundings")


def query_alone(q, k, wq, wk, cos, sin):
    return rotated(q, wq, cos, sin), norm(k, wk)


def other_turns(q, k, wq, wk, cos, sin):
    return rotated(q, wq, cos, sin), rotated(k, wk, cos + 1, sin)


def normalised_is_used(q, k, wq, wk, cos, sin):
    n = norm(q, wq).transpose(1, 2)
    turned = (n * cos.unsqueeze(1)) + (rotate_half(n) * sin.unsqueeze(1))
    return turned, n, rotated(k, wk, cos, sin)


def interleaved(q, k, wq, wk, cos, sin):
    def turn(t, w):
        n = norm(t, w).transpose(1, 2)
        pairs = torch.stack((-n[..., 1::2], n[..., ::2]), -1).flatten(-2)
        return n * cos.unsqueeze(1) + pairs * sin.unsqueeze(1)

    return turn(q, wq), turn(k, wk)


def without_norm(q, k, wq, wk, cos, sin):
    def turn(t):
        t = t.transpose(1, 2)
        return (t * cos.unsqueeze(1)) + (rotate_half(t) * sin.unsqueeze(1))

    return turn(q), turn(k)


def query_is_needed_first(q, k, wq, wk, cos, sin):
    """The key is computed from the rotated query."""
    turned = rotated(q, wq, cos, sin)
    return turned, rotated(k + F.relu(turned[:, :2].transpose(1, 2)), wk, cos, sin)


def other_half_is_negative(q, k, wq, wk, cos, sin):
    def turn(t, w):
        n = norm(t, w).transpose(1, 2)
        half = n.shape[-1] // 2
        turned = torch.cat((-n[..., :half], n[..., half:]), dim=-1)
        return (n * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))

    return turn(q, wq), turn(k, wk)


def other_eps(q, k, wq, wk, cos, sin):
    def turn(t, w, eps):
        n = F.rms_norm(t, (t.shape[-1],), w, eps).transpose(1, 2)
        return (n * cos.unsqueeze(1)) + (rotate_half(n) * sin.unsqueeze(1))

    return turn(q, wq, 1e-6), turn(k, wk, 1.0)


def norm_of_all_heads(q, k, wq, wk, cos, sin):
    def turn(t, w):
        n = F.rms_norm(t, t.shape[2:], w.expand(t.shape[2:]).contiguous(), 1e-6).transpose(1, 2)
        return (n * cos.unsqueeze(1)) + (rotate_half(n) * sin.unsqueeze(1))

    return turn(q, wq), turn(k, wk)


@pytest.mark.parametrize(
    "function",
    [
        query_alone, other_turns, normalised_is_used, interleaved, without_norm,
        query_is_needed_first, other_half_is_negative, other_eps, norm_of_all_heads,
    ],
)  # fmt: skip
def test_is_left_alone(function):
    gm, _, ours, true = rewrite(function, *arguments(torch.float32))
    assert count(gm, OP) == 0
    torch.testing.assert_close(ours, true)
