"""Hand-written chains of RMSNorm: which are joined, which are not, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, rewrite, x

from bicompile import registry, testing

registry.load_all()
ours = torch.ops.bicompile
WEIGHT = x(64) * 0.5 + 1


def llama(t, w):
    h = t.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(t.dtype)


def t5(t, w):
    variance = t.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = t * torch.rsqrt(variance + 1e-6)
    return w * h.to(w.dtype)


def gemma(t, w):
    h = t.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).type_as(t)


def olmo(t, w):
    h = t.to(torch.float32)
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6)
    return (w.float() * h).to(t.dtype)


def without_weight(t, w):
    h = t.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype)


def module(t, w):
    return F.rms_norm(t, (64,), w, 1e-6)


def offset_after_rounding(t, w):
    h = t.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(t.dtype)
    return h * (w + 1)


CHAINS = (llama, t5, gemma, olmo, without_weight, module, offset_after_rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_rms_norm_is_fused_and_changes_no_bit(chain, dtype):
    t, w = x(33, 64, dtype=dtype), WEIGHT.to(dtype)
    gm, _, _, _ = rewrite(chain, t, w)
    assert count(gm, ours.rms_norm.default) == 1
    assert count(gm, ours.mean.default) == 0
    torch._dynamo.reset()
    fused = torch.compile(chain, backend="batch_invariant")(t, w)
    torch._dynamo.reset()
    left = torch.compile(chain, backend="batch_invariant", options={"disable": "fuse"})(t, w)
    testing.assert_same_bits(fused, left, "fused and unfused")


def test_a_chain_whose_middle_is_used_is_not_fused():
    def shared(t, w):
        variance = t.pow(2).mean(-1, keepdim=True)
        return t * torch.rsqrt(variance + 1e-6) * w, variance

    gm, _, result, expected = rewrite(shared, x(3, 64), WEIGHT)
    assert count(gm, ours.rms_norm.default) == 0
    torch.testing.assert_close(result, expected)


def fourth_powers(t, w):
    return t * torch.rsqrt(t.pow(4).mean(-1, keepdim=True) + 1e-6) * w


def along_the_first_axis(t, w):
    return t * torch.rsqrt(t.pow(2).mean(0, keepdim=True) + 1e-6) * w


def of_another_tensor(t, w):
    return (t + 1) * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * w


@pytest.mark.parametrize("chain", [fourth_powers, along_the_first_axis, of_another_tensor])
def test_what_is_nearly_rms_norm_is_left_alone(chain):
    gm, _, result, expected = rewrite(chain, x(3, 64), WEIGHT)
    assert count(gm, ours.rms_norm.default) == 0
    torch.testing.assert_close(result, expected)


def test_a_factor_of_each_element_is_no_weight():
    t, factor = x(3, 64), x(3, 64) + 2
    gm, _, result, expected = rewrite(without_weight_times, t, factor)
    assert count(gm, ours.rms_norm.default) == 1
    torch.testing.assert_close(result, expected)


def without_weight_times(t, factor):
    return without_weight(t, None) * factor
