"""Ops whose parts PyTorch chooses by sizes or strides are always made of the same parts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rewriting import x

from bicompile import capture, testing

aten = torch.ops.aten
HALF = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, backend="batch_invariant", fullgraph=True, **kwargs)


def check_row(function, batch, at=3):
    """One row has the same bits alone and in the batch."""
    run = compiled(function, dynamic=False)
    with torch.no_grad():
        alone, among = run(batch[at : at + 1]), run(batch)
        testing.assert_same_bits(alone, among[at : at + 1], "row")
        return among, function(batch)


def random(module, dtype):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).eval()


@each_half
@pytest.mark.parametrize("shape", [(5, 16), (5, 7, 16), (5, 3, 7, 16)], ids=str)
def test_linear_of_a_transposed_batch(shape, dtype):
    """One row is contiguous in any order of its axes, several are not."""
    layer = random(nn.Linear(16, 32), dtype)
    batch = x(*shape, dtype=dtype)
    ours, eager = check_row(lambda t: layer(t.transpose(0, -2)).transpose(0, -2), batch)
    torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


def test_linear_of_bytes():
    """Weights and activations in int8, a scale for each row: products of integers are exact."""
    weight, scales = torch.randint(-127, 128, (64, 48), dtype=torch.int8), torch.rand(48)

    def linear(t):
        scale = t.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm((t / scale).round().to(torch.int8), weight) * scale * scales

    batch = x(40, 64)
    ours, eager = check_row(linear, batch)
    torch.testing.assert_close(ours, eager)


@each_half
def test_linear_of_one_vector_is_a_row(dtype):
    layer, batch = random(nn.Linear(16, 32), dtype), x(5, 16, dtype=dtype)
    run = compiled(layer)
    with torch.no_grad():
        testing.assert_same_bits(run(batch[3]), run(batch)[3], "vector")


def check_attention(dtype, length=7):
    attention = random(nn.MultiheadAttention(16, 2, batch_first=True), dtype).train()
    check_row(lambda t: attention(t, t, t, need_weights=False)[0], x(5, length, 16, dtype=dtype))


@each_half
def test_multihead_attention(dtype):
    check_attention(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.soak)], ids=str
)
def test_decoder_layer(dtype):
    layer = random(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), dtype)
    check_row(lambda t: layer(t, t.flip(1)), x(5, 7, 16, dtype=dtype))


def test_the_parts_that_pytorch_chooses_are_caught(monkeypatch):
    monkeypatch.delitem(capture._WHOLE, aten.linear.default)
    with pytest.raises(testing.InvarianceViolation):
        check_attention(torch.bfloat16, length=9)  # compiled code is kept by its shapes


def check_product(*sizes):
    factors = [x(a, b) for a, b in itertools.pairwise(sizes)]
    ours, eager = check_row(lambda t: torch.linalg.multi_dot([t, *factors[1:]]), factors[0])
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-3)


def test_a_product_of_several_matrices():
    """From the left it is cheaper for one row, from the right for all."""
    check_product(40, 30, 20, 2)


def test_the_cheapest_order_is_caught(monkeypatch):
    monkeypatch.delitem(capture._WHOLE, aten.linalg_multi_dot.default)
    with pytest.raises(testing.InvarianceViolation):
        check_product(41, 30, 20, 2)


def test_gradients_of_linear():
    layer = nn.Linear(16, 32)
    batch = x(5, 7, 16)
    loss = compiled(lambda t: layer(t.transpose(0, 1)).square().sum())(batch)
    loss.backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(batch.transpose(0, 1)).square().sum().backward()
    for a, p in zip(ours, layer.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param({"bias": False}, torch.float16, marks=pytest.mark.soak),
        ({"bidirectional": True}, torch.float32),
        pytest.param({"proj_size": 8}, torch.bfloat16, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_lstm(form, dtype):
    """On a CPU, PyTorch hands whole layers to a library, but not of every form and dtype."""
    net = random(nn.LSTM(16, 16, batch_first=True, **form), dtype)
    ours, eager = check_row(lambda t: net(t)[0], x(5, 3, 16, dtype=dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)


def check_position(function):
    t = x(3, 5)
    t[0, 4], t[2, 1] = 9.0, -9.0
    run = compiled(function, dynamic=False)
    for given in (t, t.t().contiguous().t()):
        assert run(given).tolist() == function(t).tolist()


@pytest.mark.parametrize("find", [torch.argmax, torch.argmin])
def test_positions_in_a_whole_tensor(find):
    """Inductor counts in the order of memory."""
    check_position(lambda t: find(t * 2))
    check_position(lambda t: find(t * 2, keepdim=True))


def test_counting_in_the_order_of_memory_is_caught():
    t = x(3, 5)
    t[0, 4] = 9.0
    run = compiled(lambda t: torch.argmax(t * 3), options={"disable": "canonicalize"})
    assert run(t.t().contiguous().t()) != t.argmax()


class Settings:
    alpha, order, rank = 3, 3, 2


@pytest.mark.parametrize(
    "function",
    [
        lambda t: torch.addmm(t, t, t, alpha=Settings.alpha),
        lambda t: t.norm(Settings.order, dim=1),
        lambda t: torch.kthvalue(t, Settings.rank, 1)[0],
        lambda t: F.interpolate(t[None, None], scale_factor=1.7, mode="bilinear"),
    ],
    ids=["addmm", "norm", "kthvalue", "interpolate"],
)
def test_numbers_under_dynamic_shapes(function):
    """A Python number is then a node of the graph."""
    t = x(7, 7)
    torch.testing.assert_close(compiled(function, dynamic=True)(t), function(t))


def test_comparing_small_indices():
    """Numbers computed from positions have no dtype of their own in Inductor."""
    t = x(3, 2, 2)
    run = compiled(lambda t: torch.linalg.matrix_power(t, 0), dynamic=False)
    assert torch.equal(run(t), torch.eye(2).expand(3, 2, 2))


def test_filling_a_tensor_in_other_strides():
    index = torch.tensor([0, 2])
    t = x(5, 4).t()
    run = compiled(lambda t: t.index_fill(1, index, 2.0))
    assert torch.equal(run(t), t.index_fill(1, index, 2.0))
