"""Values at the places where a shortcut of a kernel or a rule would show."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from bicompile import native, registry, testing
from bicompile.inductor import _round_every_op

OPS = registry.load_all()
INF = math.inf
SIZES = (1, 7, 16, 17, 33, 70, 300)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def compiled(function, *args, **options):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend="batch_invariant", options=options)(*args)


@pytest.mark.parametrize("k", SIZES)
def test_logsumexp_of_infinities(k):
    x = torch.randn(4, k)
    x[0], x[1, -1], x[2, 0] = -INF, INF, -INF
    ours = OPS["logsumexp"].op(x, [1], False)
    torch.testing.assert_close(ours, x.logsumexp(1))
    columns = OPS["logsumexp"].op(x.t().contiguous(), [0], False)
    testing.assert_same_bits(columns, ours, "side by side")


@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("k", SIZES)
def test_softmax_of_one_large_element(k, at):
    x = torch.randn(3, k)
    x[:, at] = 300.0
    torch.testing.assert_close(OPS["softmax"].op(x, 1, torch.float32), torch.softmax(x, 1))
    top, shift = OPS["softmax_statistics"].op(x, 1)
    torch.testing.assert_close((x - top) - shift, torch.log_softmax(x, 1))


@pytest.mark.parametrize("k", [17, 300])
def test_statistics_of_a_row_far_from_zero(k):
    x = torch.randn(5, k) + 1e4
    exact = F.layer_norm(x.double(), (k,), eps=1e-5)
    ours = OPS["layer_norm"].op(x, 1, None, None, 1e-5)[0].double()
    theirs = F.layer_norm(x, (k,), eps=1e-5).double()
    assert (ours - exact).norm() <= 1.02 * (theirs - exact).norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eps_of_rms_norm(dtype, device):
    x = (torch.randn(3, 16) * 1e-4).to(device, dtype)
    ours = compiled(lambda x: torch.ops.aten._fused_rms_norm(x, [16], None, None)[0], x)
    torch.testing.assert_close(ours, F.rms_norm(x, (16,)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("n", [3, 7, 3.0])
@pytest.mark.parametrize("name", ["pow", "div"])
def test_a_number_that_may_vary_counts_as_one_that_may_not(name, n, device):
    """A dynamic graph takes the numbers of a closure for inputs."""
    x = torch.randn(57, 33).to(device)
    function = lambda x: getattr(torch, name)(x, n)  # noqa: E731
    found = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        run = torch.compile(function, backend="batch_invariant", dynamic=dynamic)
        found.append(run(x))
    testing.assert_same_bits(found[1], found[0], "dynamic")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_decomposition_rounds_does_not_follow_strides(device):
    """The factor of renorm is rounded whether it is joined with the product or not."""
    x = 3 * torch.randn(40, 5, 50).to(device, torch.bfloat16)
    norm = torch.linalg.vector_norm(x, 2, (1, 2), True, dtype=torch.float32)
    factor = torch.where(norm > 1, 1 / (norm + 1e-7), 1.0).bfloat16()
    for given in (x, x.mT.contiguous().mT):
        torch._dynamo.reset()
        run = torch.compile(lambda x: torch.renorm(x, 2, 0, 1.0), backend="batch_invariant")
        testing.assert_same_bits(run(given), x * factor, "rounded")


def test_half_types_within_a_decomposition_are_marked():
    """In graphs within the graph, too: layers that repeat are one."""
    inside = make_fx(lambda x: (x.bfloat16() + 1).float())(torch.randn(3))
    outside = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    outside.layer = inside
    _round_every_op(outside)
    marked = [n.meta.get("low_precision_pointwise_barrier", False) for n in inside.graph.nodes]
    assert marked == [False, True, True, True, False]


def test_every_op_rounds_though_it_is_fused():
    x, y, z = (torch.randn(5, 33).bfloat16() for _ in range(3))

    def chain(x, y, z):
        return ((x * y + z) * z - x) * y

    testing.assert_same_bits(compiled(chain, x, y, z), chain(x, y, z), "fused")


def test_one_schedule_on_a_cpu():
    x = torch.randn(5, 33)
    single = compiled(lambda x: x.softmax(-1), x, schedules="single")
    testing.assert_same_bits(single, compiled(lambda x: x.softmax(-1), x), "single")


@pytest.mark.parametrize("shape", [(17,), (5, 17)])
def test_addmm_rounds_every_operation(shape):
    """alpha * (a @ b) + beta * self: three roundings behind the sum."""
    a, b, bias = torch.randn(5, 40), torch.randn(40, 17), torch.randn(shape)
    product = OPS["mm"].op(a, b, False)
    ours = OPS["addmm"].op(bias, a, b, 0.3, 1.7, False)
    testing.assert_same_bits(ours, product * 1.7 + bias * 0.3, "addmm")


@pytest.mark.parametrize("k", SIZES)
def test_rms_norm_has_the_mean_of_its_own_op(k):
    x = torch.randn(33, k)
    mean = OPS["mean"].op(x * x, [1], True, torch.float32)
    fused = OPS["rms_norm"].op(x, 1, None, 1e-6, 0.0, True)
    root = numpy.sqrt((mean + 1e-6).numpy())  # PyTorch's own is not rounded to nearest everywhere
    scale = torch.from_numpy(numpy.float32(1) / root)
    testing.assert_same_bits(fused, x * scale, "rms_norm")
