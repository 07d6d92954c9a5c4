"""Products that are joined with what follows them: which are, which are not, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, rewrite, x
from strategies import crossed

from bicompile import registry, testing

OPS = {name: registry.load_all()[name].op for name in ("mm", "mm_add", "swiglu", "qkv_proj")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights(dtype, *shapes):
    return [x(*shape, dtype=dtype) + i for i, shape in enumerate(shapes)]


def swiglu(t, gate, up):
    return F.silu(F.linear(t, gate)) * F.linear(t, up)


def residual(t, w, h):
    return h + F.linear(t, w)


def qkv(t, q, k, v):
    return F.linear(t, q), F.linear(t, k).relu(), F.linear(t, v)


def qkv_with_bias(t, q, k, v, a, b, c):
    return F.linear(t, q, a), F.linear(t, k, b), F.linear(t, v, c)


CASES = {
    "swiglu": (swiglu, ((40, 24), (40, 24))),
    "mm_add": (residual, ((40, 24), (2, 5, 40))),
    "qkv_proj": (qkv, ((40, 24), (16, 24), (16, 24))),
    "qkv_proj with bias": (qkv_with_bias, ((40, 24), (16, 24), (9, 24), (40,), (16,), (9,))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_fused(name, dtype):
    function, shapes = CASES[name]
    gm, report, _, _ = rewrite(function, x(2, 5, 24, dtype=dtype), *weights(dtype, *shapes))
    assert count(gm, OPS[name.split()[0]]) == 1
    assert count(gm, OPS["mm"]) == 0
    assert any(name.split()[0] in (d.became or "") for d in report.decisions)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
@crossed(("dtype", "rows"), DTYPES, [150, 1, 5])
def test_no_bit_changes(name, dtype, rows, device):
    function, shapes = CASES[name]
    shapes = [(2, rows, 40) if len(s) == 3 else s for s in shapes]
    args = [t.to(device) for t in (x(2, rows, 24, dtype=dtype), *weights(dtype, *shapes))]
    with torch.no_grad():
        fused = torch.compile(function, backend="batch_invariant")(*args)
        torch._dynamo.reset()
        options = {"disable": "fuse"}
        apart = torch.compile(function, backend="batch_invariant", options=options)(*args)
    testing.assert_same_bits(fused, apart, "fused and apart")


def test_a_canary_is_seen():
    """Rounding once less, as a fused kernel likes to do, gives other bits."""
    t, gate, up = (v.bfloat16() for v in (x(9, 24), *weights(torch.float32, (40, 24), (40, 24))))
    kept = OPS["swiglu"](t, gate.t(), up.t(), False)
    wide = OPS["swiglu"](t.float(), gate.t().float(), up.t().float(), False).bfloat16()
    with pytest.raises(testing.InvarianceViolation):
        testing.assert_same_bits(wide, kept, "fewer roundings")


def two_uses(t, gate, up):
    product = F.linear(t, up)
    return F.silu(F.linear(t, gate)) * product, product


def other_input(t, gate, up):
    return F.silu(F.linear(t, gate)) * F.linear(t + 1, up)


def broadcast(t, w, h):
    return F.linear(t, w) + h


def transposed(t, w, h):
    return F.linear(t, w) + h.transpose(1, 2)


def scaled(t, w, h):
    return torch.add(h, F.linear(t, w), alpha=3)


def one_gate_for_all(t, gate, up):
    return F.silu(F.linear(t, gate)) * F.linear(t, up)


def nearly_silu(t, gate, up):
    h = F.linear(t, gate)
    return h / (torch.exp(-h) + 2) * F.linear(t, up)


def depends(t, q, k):
    """The third weight comes from the first product."""
    first = t @ q
    return first, t @ k, t @ (first.t() @ t).t()


def pair(t, q, k):
    return t @ q, t @ k


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (two_uses, ((40, 24), (40, 24))),
        (other_input, ((40, 24), (40, 24))),
        (broadcast, ((40, 24), (40,))),
        (transposed, ((40, 24), (2, 40, 5))),
        (scaled, ((40, 24), (2, 5, 40))),
        (one_gate_for_all, ((1, 24), (40, 24))),
        (nearly_silu, ((40, 24), (40, 24))),
    ],
)
def test_is_left_alone(function, shapes):
    t = x(2, 5, 24)
    gm, _, ours, true = rewrite(function, t, *weights(torch.float32, *shapes))
    assert not any(count(gm, OPS[name]) for name in ("mm_add", "swiglu", "qkv_proj"))
    torch.testing.assert_close(ours, true)


def three_inputs(t, q, k):
    return t @ q, (t + 1) @ k, (t + 2) @ k


def with_factors(t, q, k, v, bias, beta=0.5, alpha=2):
    return [torch.addmm(bias, t, w, beta=beta, alpha=alpha) for w in (q, k, v)]


def without_factors(t, *parameters):
    return with_factors(t, *parameters, beta=1, alpha=1)


def test_a_residual_of_another_dtype_is_added_apart():
    t, w, h = x(2, 5, 24).bfloat16(), x(40, 24).bfloat16(), x(2, 5, 40)
    gm, _, ours, true = rewrite(residual, t, w, h)
    assert count(gm, OPS["mm_add"]) == 0
    assert ours.dtype is true.dtype is torch.float32
    torch.testing.assert_close(ours, true, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize(("function", "joined"), [(without_factors, 1), (with_factors, 0)])
def test_products_with_factors_do_not_stand_side_by_side(function, joined):
    parameters = weights(torch.float32, (24, 9), (24, 9), (24, 9), (9,))
    gm, _, ours, true = rewrite(function, x(24, 24), *parameters)
    assert count(gm, OPS["qkv_proj"]) == joined
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [depends, pair, three_inputs])
def test_products_that_do_not_stand_side_by_side(function):
    gm, _, ours, true = rewrite(function, x(24, 24), *weights(torch.float32, (24, 24), (24, 24)))
    assert count(gm, OPS["qkv_proj"]) == 0
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-3)
