"""BatchNorm by the statistics of a batch: what it computes, and that it is deterministic."""

from __future__ import annotations

import copy
import itertools
import statistics

import pytest
import torch
import transformers
from torch import nn

import bicompile
from bicompile import errors, testing
from bicompile.report import REPORTS, Verdict

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
ALLOW = {"batch_statistics": "allow"}
NORMS = {
    "1d": (lambda: nn.BatchNorm1d(7), (32, 7)),
    "1d of sequences": (lambda: nn.BatchNorm1d(7, momentum=0.5), (5, 7, 33)),
    "2d": (lambda: nn.BatchNorm2d(6), (8, 6, 9, 11)),
    "3d": (lambda: nn.BatchNorm3d(4, eps=1e-2), (3, 4, 5, 6, 7)),
    "without weights": (lambda: nn.BatchNorm2d(6, affine=False), (4, 6, 5, 5)),
    "without running statistics": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        (4, 6, 5, 5),
    ),
}
DTYPES = {"float32": (torch.float32,) * 2, "mixed": (torch.bfloat16, torch.float32)}


class Called:
    """A norm, an input far from zero and a gradient."""

    def __init__(self, name, dtypes="float32", device="cpu", seed=0):
        torch.manual_seed(seed)
        make, shape = NORMS[name]
        input, weight = DTYPES[dtypes]
        self.norm = make().to(device, weight).train()
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
        self.x, self.grad = (
            t.to(device, input) for t in (torch.randn(shape) + 3, torch.randn(shape))
        )

    def double(self):
        other = copy.copy(self)
        other.norm, other.x, other.grad = self.norm.double(), self.x.double(), self.grad.double()
        return other

    def found(self, compiled=True, **kwargs):
        """Output, statistics and gradients, by name."""
        norm = function = copy.deepcopy(self.norm)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(norm, backend="batch_invariant", options=ALLOW, **kwargs)
        x = self.x.detach().requires_grad_()
        out = function(x)
        out.backward(self.grad)
        gradients = {f"gradient of {n}": p.grad for n, p in norm.named_parameters()}
        return {
            "output": out.detach(),
            "gradient": x.grad,
            **gradients,
            **dict(norm.named_buffers()),
        }


def error(found, true):
    return (found.double() - true.double()).square().mean().sqrt().item()


QUICK = {("1d of sequences", "float32"), ("2d", "mixed")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak)
    for case in itertools.product(NORMS, DTYPES)
]


@each_device
@pytest.mark.parametrize(("name", "dtypes"), CASES)
def test_errors_are_no_worse_than_pytorchs(name, dtypes, device):
    ours, eager = {}, {}
    for seed in range(4):
        called = Called(name, dtypes, device, seed)
        expected = called.found(compiled=False)
        found = called.found()
        true = copy.deepcopy(called).double().found(compiled=False)
        assert list(found) == list(expected)
        for key, tensor in found.items():
            assert tensor.dtype is expected[key].dtype
            assert tensor.shape == expected[key].shape
            ours.setdefault(key, []).append(error(tensor, true[key]))
            eager.setdefault(key, []).append(error(expected[key], true[key]))
    for key, errors_of_ours in ours.items():
        assert statistics.median(errors_of_ours) <= max(eager[key]), key


@each_device
@pytest.mark.parametrize(
    "name",
    [
        "2d",
        *(pytest.param(n, marks=pytest.mark.soak) for n in ("1d", "without running statistics")),
    ],
)
def test_is_deterministic(name, device):
    called = Called(name, device=device)
    expected = called.found()
    for threads, dynamic in ((1, None), (2, True), (3, False)):
        with testing.num_threads(threads):
            found = called.found(dynamic=dynamic)
        what = f"{threads} threads, dynamic={dynamic}"
        testing.assert_same_bits(list(found.values()), list(expected.values()), what)
    with pytest.raises(testing.InvarianceViolation):  # PyTorch's own sums are others
        testing.assert_same_bits(
            list(called.found(compiled=False).values()), list(expected.values()), "eager"
        )


def test_what_is_reported():
    REPORTS.clear()
    Called("2d").found()
    given = {d.target: d.verdict for report in REPORTS for d in report.decisions if d.became}
    assert given == {
        "aten._native_batch_norm_legit_functional.default": Verdict.DETERMINISTIC,
        "aten.native_batch_norm_backward.default": Verdict.DETERMINISTIC,
    }
    explained = bicompile.explain(Called("2d").norm, Called("2d").x, options=ALLOW)
    assert explained.counts()[Verdict.DETERMINISTIC.value] == 1
    assert not explained.refused


def test_op_of_export():
    stats = [torch.ones(8) for _ in range(4)]

    def function(x):
        return torch.ops.aten._batch_norm_with_update(x, *stats, 0.1, 1e-5)[0]

    x = torch.randn(3, 8)
    expected, before = function(x), [t.clone() for t in stats]
    for t in stats[2:]:
        t.fill_(1.0)
    with torch.no_grad():
        found = torch.compile(function, backend="batch_invariant", options=ALLOW)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stats, before)


def test_instances_are_rows_with_and_without_the_option():
    norm, x = nn.InstanceNorm1d(8, affine=True), torch.randn(3, 8, 5)
    REPORTS.clear()
    with torch.no_grad():
        found = torch.compile(norm, backend="batch_invariant", options=ALLOW)(x)
        expected = torch.compile(norm, backend="batch_invariant")(x[1:2])
    testing.assert_same_bits(found[1:2], expected, "a row")
    assert {d.verdict for report in REPORTS for d in report.decisions} == {Verdict.INVARIANT}


def test_is_refused_without_the_option():
    with pytest.raises(errors.BatchStatistics, match='"batch_statistics": "allow"'):
        torch.compile(Called("2d").norm, backend="batch_invariant")(Called("2d").x)


class Residual(nn.Module):
    """A convolution, and a block around which the input is added."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).relu().mean((2, 3)))


class ResNet(nn.Module):
    """The model of transformers."""

    def __init__(self):
        super().__init__()
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        config = transformers.ResNetConfig(**sizes, num_labels=5)
        self.model = transformers.ResNetForImageClassification(config)

    def forward(self, x):
        return self.model(pixel_values=x).logits


def trained(make, steps, device):
    """Runs from the same start; each returns losses, weights and running statistics."""
    torch.manual_seed(0)
    model = make().to(device).train()
    start = copy.deepcopy(model.state_dict())
    forward = bicompile.compile(lambda x: model(x), options=ALLOW)

    def run():
        torch.manual_seed(1)
        model.load_state_dict(start)
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
        for _ in range(steps):
            images, labels = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(t.clone() for t in model.state_dict().values())]

    return run


@pytest.mark.soak
@each_device
@pytest.mark.parametrize("make", [Residual, ResNet])
def test_two_runs_end_in_the_same_weights(make, device):
    run = trained(make, 5, device)
    first = run()
    with testing.num_threads(2):
        second = run()
    testing.assert_same_bits(first, second, "after 5 steps")
