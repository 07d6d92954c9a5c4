"""Repeated layers become calls of one subgraph, and no bit follows from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from rewriting import count, rewrite, x

from bicompile import testing
from bicompile.report import REPORTS

INVOKE = torch.ops.higher_order.invoke_subgraph
aten = torch.ops.aten


class Layer(nn.Module):
    """Norm, two projections, an attention over the row's own past, a residual."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h, cache=None, at=None):
        q, k, v = self.up(self.norm(h)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.index_copy_(2, at, k)
            k = cache
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.down(nn.functional.gelu(o.transpose(1, 2).flatten(2)))


class Stack(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(Layer(w) for w in widths)

    def forward(self, h, caches=None, at=None):
        for i, layer in enumerate(self.layers):
            h = layer(h, None if caches is None else caches[i], at)
        return h


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack(*[32] * 5).eval()


def compiled(module, *args, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(module, backend="batch_invariant", options=options)(*args)


def test_equal_layers_are_one_subgraph(stack):
    gm, report, result, expected = rewrite(stack, x(3, 7, 32))
    assert 4 <= count(gm, INVOKE) <= 5
    (layer,) = (m for m in gm.children() if isinstance(m, torch.fx.GraphModule))
    assert count(layer, torch.ops.bicompile.sdpa.default) == 1
    assert count(gm, torch.ops.bicompile.sdpa.default) <= 1
    lifted = [d for d in report.decisions if d.became == "repeated_layer"]
    assert len(lifted) == count(gm, INVOKE)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_changes(stack, dtype, device):
    stack.to(device, dtype)
    for batch in (1, 5):  # the second graph has a symbolic batch
        h = x(batch, 7, 32, dtype=dtype).to(device)
        lifted = compiled(stack, h)
        assert "repeated_layer" in REPORTS[-1].counts()
        plain = compiled(stack, h, disable="deduplicate")
        assert "repeated_layer" not in REPORTS[-1].counts()
        testing.assert_same_bits(lifted, plain, f"batch {batch}")


def test_writes_stay_in_place_and_outside(stack):
    caches, at = [torch.zeros(3, 2, 7, 16) for _ in range(5)], torch.arange(7)
    gm, _, _, _ = rewrite(stack, x(3, 7, 32), caches, at)
    (layer,) = (m for m in gm.children() if isinstance(m, torch.fx.GraphModule))
    assert count(layer, aten.index_put.default) == 0
    assert count(gm, aten.index_put.default) == 5
    ours = [torch.zeros_like(c) for c in caches]
    places = [c.data_ptr() for c in ours]
    theirs = [torch.zeros_like(c) for c in caches]
    lifted = compiled(stack, x(3, 7, 32), ours, at)
    plain = compiled(stack, x(3, 7, 32), theirs, at, disable="deduplicate")
    testing.assert_same_bits((lifted, *ours), (plain, *theirs), "caches")
    assert [c.data_ptr() for c in ours] == places and all(c.any() for c in ours)


def test_other_layers_are_left_alone():
    def chain(h):
        for exponent in (2, 3, 4, 5):
            h = (h @ h.mT).pow(exponent).softmax(-1) @ h
        return h

    gm, _, _, _ = rewrite(chain, x(3, 5, 8))
    assert count(gm, INVOKE) == 0


def test_layers_of_other_sizes_are_left_alone():
    def chain(h, *weights):
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            h = ((h @ up).softmax(-1) @ down).sigmoid().exp().sqrt()
        return h

    gm, _, _, _ = rewrite(chain, x(5, 8), *(x(*s) for w in (2, 3, 4, 5) for s in ((8, w), (w, 8))))
    assert count(gm, INVOKE) == 0


def test_layers_that_read_each_other_otherwise_are_left_alone():
    """Equal ops in equal order, but every second layer reads its two inputs crosswise."""

    def chain(a, b):
        for i in range(4):
            c, d = (a, b) if i % 2 else (b, a)
            a, b = (c @ b).softmax(-1) @ a, (d @ a).softmax(-1) @ b
            a, b = a.sigmoid().sqrt().exp(), b.sigmoid().sqrt().exp()
        return a, b

    _, _, result, expected = rewrite(chain, x(3, 8, 8), x(3, 8, 8) + 1)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_views_are_taken_outside():
    """Of what a layer made, and of what it was given."""

    def chain(h, *weights):
        kept = []
        for w in weights:
            part = (h @ w.mT).softmax(-1).sigmoid().sqrt().exp()
            kept += [w.mT[1:], part[1:].mT]
            h = part.tanh()
        return h, *kept

    args = x(3, 8), *(x(8, 8) + i for i in range(5))
    gm, _, result, expected = rewrite(chain, *args)
    assert count(gm, INVOKE) >= 3
    torch._dynamo.reset()
    plain = compiled(chain, *args, disable="deduplicate")
    testing.assert_same_bits(compiled(chain, *args), plain, "views")
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_positions_are_taken_outside():
    """As results of a layer they would be kernels of their own; the write reads them inside its."""

    def chain(h, weights, caches, lengths):
        for w, cache, length in zip(weights, caches, lengths, strict=True):
            part = (h @ w.mT).softmax(-1).sigmoid().sqrt().exp()
            at = torch.arange(3) + length
            length.add_(3)
            cache.index_copy_(0, at, part)
            h = (part + cache[:3]).tanh() * at.unsqueeze(1)
        return h

    def args():
        weights, caches = ([x(rows, 8) + i for i in range(5)] for rows in (8, 16))
        return x(3, 8), weights, caches, [torch.tensor(i % 4) for i in range(5)]

    gm, _, _, _ = rewrite(chain, *args())
    layers = [m for m in gm.children() if isinstance(m, torch.fx.GraphModule)]
    assert layers and count(gm, INVOKE) >= 3
    for layer in layers:
        made = [n.meta["val"] for n in layer.graph.output_node().args[0]]
        assert made and all(v.is_floating_point() for v in made)
    ours, theirs = args(), args()
    lifted, plain = compiled(chain, *ours), compiled(chain, *theirs, disable="deduplicate")
    testing.assert_same_bits((lifted, *ours[2], *ours[3]), (plain, *theirs[2], *theirs[3]), "all")
    assert [int(n) for n in ours[3]] == [i % 4 + 3 for i in range(5)]


def test_a_part_of_a_wider_tensor_is_not_returned():
    """Inductor may write what `cat` joins into the joined tensor, at an offset."""

    def chain(h, *weights):
        kept = []
        for w in weights:
            a = (h @ w).sigmoid()
            b = (h @ w.mT).tanh()
            kept.append(b.sqrt())
            h = torch.cat([a, b], 1).softmax(-1)[:, 4:12].exp().sqrt().sin().cos()
            kept.append(b)
        return h, *kept

    args = x(3, 8), *(x(8, 8) + i for i in range(5))
    plain = compiled(chain, *args, disable="deduplicate")
    testing.assert_same_bits(compiled(chain, *args), plain, "parts")
    gm, _, _, _ = rewrite(chain, *args)
    assert count(gm, INVOKE) == 0


@pytest.mark.parametrize("sizes", [lambda n: (n / 7, 8), lambda n: (2.0, 2 * n + 1)])
def test_layers_that_read_computed_sizes_are_left_alone(sizes):
    """A subgraph takes no quotient of sizes, and no tensor whose size is 2 n + 1 without n."""

    def program(t):
        factor, size = sizes(t.shape[0])
        t = t.sum() + torch.arange(size, device=t.device)
        for _ in range(4):
            t = torch.tanh(t.sin() * factor + 1).cos().exp().sigmoid().abs().neg().square().sqrt()
        return t

    torch._dynamo.reset()
    run = torch.compile(program, backend="batch_invariant", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x(5, 8)), program(x(5, 8)))


def test_training_graphs_are_left_alone():
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.GELU())))
    loss = torch.compile(model, backend="batch_invariant")(x(3, 8)).square().view(-1)[0]
    assert "repeated_layer" not in REPORTS[-1].counts()
    loss.backward()
    assert "repeated_layer" not in REPORTS[-1].counts()
