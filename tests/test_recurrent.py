"""Cells that PyTorch has for a GPU alone, opened: values and gradients of its cells for a CPU."""

from __future__ import annotations

import pytest
import torch

from bicompile import recurrent


def numbers(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Opened(torch.autograd.Function):
    """A cell whose gradient is ours as well; its arguments are those of `cell`."""

    @staticmethod
    def forward(ctx, cell, gates_x, gates_h, state, *biases):
        *out, kept = getattr(recurrent, cell)(gates_x, gates_h, state, *biases)
        ctx.save_for_backward(state, out[-1], kept)
        ctx.cell, ctx.has_bias = cell, bool(biases)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        state, new, kept = ctx.saved_tensors
        if ctx.cell == "lstm_cell":
            gates, to_state, bias = recurrent.lstm_cell_backward(
                *grads, state, new, kept, ctx.has_bias
            )
            found = [gates, gates, to_state, bias, bias]
        else:
            found = [*recurrent.gru_cell_backward(*grads, kept, ctx.has_bias)]
        return None, *(found if ctx.has_bias else found[:3])


CELLS = {"lstm_cell": (torch.lstm_cell, 4), "gru_cell": (torch.gru_cell, 3)}
biased = pytest.mark.parametrize("bias", [True, False])


@biased
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell, bias):
    eager, gates = CELLS[cell]
    size, (x, h, c) = 5, (numbers(3, n) for n in (4, 5, 5))
    weights = numbers(gates * size, 4), numbers(gates * size, size)
    biases = (numbers(gates * size), numbers(gates * size) * 0.5) if bias else ()
    inputs = [t.requires_grad_() for t in (x, h, c, *weights, *(b.detach() for b in biases))]

    def ours(x, h, c, w, u, *biases):
        state = c if cell == "lstm_cell" else h
        return Opened.apply(cell, x @ w.t(), h @ u.t(), state, *biases)

    def theirs(x, h, c, w, u, *biases):
        state = (h, c) if cell == "lstm_cell" else h
        out = eager(x, state, w, u, *biases)
        return out if isinstance(out, tuple) else (out,)

    found, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(found, expected)
    loss, same = (sum((t * t).sum() for t in out) for out in (found, expected))
    used = [t for t in inputs if cell == "lstm_cell" or t is not c]
    torch.testing.assert_close(torch.autograd.grad(loss, used), torch.autograd.grad(same, used))


@pytest.mark.parametrize("absent", ["grad_hy", "grad_cy"])
def test_one_gradient_alone(absent):
    cx, cy, grad = (numbers(3, 5) + n for n in range(3))
    kept = numbers(3, 20).sigmoid()
    one = {"grad_hy": grad, "grad_cy": grad} | {absent: None}
    zero = {"grad_hy": grad, "grad_cy": grad} | {absent: torch.zeros_like(grad)}
    found, expected = (
        recurrent.lstm_cell_backward(**given, cx=cx, cy=cy, workspace=kept, has_bias=True)
        for given in (one, zero)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert recurrent.lstm_cell_backward(None, None, cx, cy, kept, True) == (None, None, None)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stand_alone_and_half_types_are_rounded_once(cell, dtype):
    gates = CELLS[cell][1]
    inputs = [numbers(6, n, dtype=dtype) for n in (gates * 8, gates * 8, 8)]
    whole = getattr(recurrent, cell)(*inputs)
    row = getattr(recurrent, cell)(*(t[4:5] for t in inputs))
    exact = getattr(recurrent, cell)(*(t.double() for t in inputs))
    for part, one, true in zip(whole, row, exact, strict=True):
        assert part.dtype is dtype and torch.equal(part[4:5], one)
        torch.testing.assert_close(part.double(), true, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", [torch.nn.LSTMCell, torch.nn.GRUCell])
def test_compiled(cell):
    module = cell(16, 16).cuda()
    compiled = torch.compile(module, backend="batch_invariant", dynamic=True)
    x = torch.randn(6, 16, device="cuda")

    def run(x):
        module.zero_grad()
        x = x.detach().requires_grad_()
        out = compiled(x)
        out = out if isinstance(out, tuple) else (out,)
        sum(t.sum() for t in out).backward()
        return [*out, x.grad]

    for whole, part in zip(run(x), run(x[2:5]), strict=True):
        assert torch.equal(whole[2:5], part)
    eager = module(x)
    eager = eager if isinstance(eager, tuple) else (eager,)
    torch.testing.assert_close(run(x)[: len(eager)], [*eager])
