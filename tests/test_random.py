"""Random ops that are allowed: deterministic for a seed and a shape, one mask for both graphs."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bicompile
from bicompile import errors, testing
from bicompile.options import Options
from bicompile.passes.audit import audit
from bicompile.pipeline import Run
from bicompile.report import REPORTS, Report, Verdict

aten = torch.ops.aten

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
ALLOW = {"random": "allow"}
COUNT = 40_000  # so many that the work is shared between threads

DRAWS = {
    "rand": lambda x: torch.rand(x.shape, device=x.device),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(0, 1000, x.shape, device=x.device),
    "randperm": lambda x: torch.randperm(COUNT, device=x.device),
    "bernoulli": torch.bernoulli,
    "bernoulli of a number": lambda x: torch.bernoulli(x, 0.3),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout of channels": lambda x: F.dropout1d(x.view(3, -1, 10), 0.3),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "multinomial": lambda x: torch.multinomial(x[:, :2000], 5),
    "multinomial with replacement": lambda x: torch.multinomial(x[:, :2000], 50, True),
    "normal": lambda x: torch.normal(x, x),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 2),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "poisson": torch.poisson,
    "gamma": torch._standard_gamma,
    "rrelu": lambda x: F.rrelu(x - 0.5, training=True),
}


def compiled(function, **kwargs):
    return torch.compile(
        function, backend="batch_invariant", options=ALLOW, fullgraph=True, **kwargs
    )


def drawn(device="cpu", seed=0, names=tuple(DRAWS), **kwargs):
    """What the ops draw, one after the other, and what the next one would."""
    x = torch.linspace(0.05, 0.95, 3 * COUNT, device=device).view(3, COUNT)
    function = compiled(lambda x: [DRAWS[name](x) for name in names], **kwargs)
    torch.manual_seed(seed)
    found = [*function(x), torch.rand(1, device=device)]
    return dict(zip([*names, "the next"], found, strict=True))


def assert_same_draws(found, expected, what):
    for name, tensor in found.items():
        testing.assert_same_bits(tensor, expected[name], f"{name}, {what}")


@each_device
def test_same_seed_same_numbers(device):
    torch._dynamo.reset()
    REPORTS.clear()
    expected = drawn(device)
    decisions = [d for report in REPORTS for d in report.decisions]
    allowed = [d for d in decisions if d.verdict is Verdict.ALLOWED]
    assert len(allowed) == (device == "cuda")  # multinomial with replacement
    others = {d.verdict for d in decisions if d not in allowed}
    assert others == {Verdict.INVARIANT, Verdict.DETERMINISTIC}
    with testing.num_threads(3):
        assert_same_draws(drawn(device), expected, "3 threads")
    for name, tensor in drawn(device, seed=1).items():
        assert not torch.equal(tensor, expected[name]), name


FEW = "dropout", "normal_", "multinomial"


def test_static_and_dynamic_graphs_agree():
    expected = drawn(names=FEW)
    assert_same_draws(drawn(names=FEW, dynamic=True), expected, "dynamic shapes")


@pytest.mark.soak
def test_another_process():
    program = (
        "import test_random as t; t.torch.set_num_threads(2);print(t.digest(t.drawn(names=t.FEW)))"
    )
    command, here = [sys.executable, "-c", program], Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(drawn(names=FEW))


def digest(found):
    """A name for all bits."""
    hashed = hashlib.sha256()
    for tensor in found.values():
        hashed.update(testing.bits(tensor).numpy().tobytes())
    return hashed.hexdigest()


DROPOUTS = {
    "dropout": lambda h: F.dropout(h, 0.4),
    "dropout of channels": lambda h: F.dropout1d(h, 0.4),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.4),
}


def step(device, checkpointing):
    """Blocks that draw, one of each kind: their output, gradients, and the next number."""
    torch.manual_seed(1)
    layer = nn.Linear(16, 16).to(device)
    x = torch.randn(2, 8, 16, device=device, requires_grad=True)

    def model(x):
        for draw in DROPOUTS.values():

            def block(x, draw=draw):
                return draw(torch.tanh(layer(x)))

            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x

    torch.manual_seed(2)
    out = compiled(model)(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, layer.weight.grad, layer.bias.grad, torch.rand(1, device=device)]


@pytest.mark.soak
@each_device
def test_checkpointing_draws_the_same_numbers_again(device):
    expected = step(device, False)
    testing.assert_same_bits(step(device, False), expected, "another run")
    found = step(device, True)
    testing.assert_same_bits(found[:-1], expected[:-1], "with checkpointing")


@each_device
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["dropout", "dropout of channels"])
def test_gradients_see_the_mask_of_the_forward(name, checkpointing, device):
    """dropout(x) is x / 0.6 or 0 at each place, so its gradient is 1 / 0.6 or 0 there."""

    def model(x):
        drop = DROPOUTS[name]
        return checkpoint(drop, x, use_reentrant=False) if checkpointing else drop(x)

    x = torch.rand(4, 8, 16, device=device).add_(1).requires_grad_()
    torch.manual_seed(3)
    out = compiled(model)(x)
    out.sum().backward()
    assert 0.2 < (out == 0).float().mean() < 0.6
    assert torch.equal(out != 0, x.grad != 0)
    assert x.grad.unique().numel() == 2


def test_what_is_drawn_again_is_refused_as_well():
    x = torch.randn(4, 8, requires_grad=True)

    def model(x):
        return checkpoint(DROPOUTS["dropout of channels"], x, use_reentrant=False)

    with pytest.raises(errors.RandomOp, match=r"aten\.bernoulli\.p draws"):
        torch.compile(model, backend="batch_invariant")(x)


def test_explain_says_what_is_only_deterministic():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    explained = bicompile.explain(model, torch.randn(2, 8), options=ALLOW)
    assert not explained.refused
    assert Verdict.DETERMINISTIC in {row.verdict for row in explained.rows}
    assert "deterministic only" in explained.text()


@each_device
def test_two_runs_end_in_the_same_weights(device):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 16)).to(device)
    start = copy.deepcopy(layer.state_dict())
    forward = bicompile.compile(lambda x: layer(x), options=ALLOW)

    def run():
        torch.manual_seed(1)
        layer.load_state_dict(start)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            forward(torch.randn(3, 5, 16).to(device)).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in layer.parameters()]

    testing.assert_same_bits(run(), run(), "after 4 steps")


@pytest.mark.parametrize(
    ("device", "replacement"), [("cuda", True), ("cuda", False), ("cpu", True)]
)
def test_only_multinomial_with_replacement_on_a_gpu_is_not_guaranteed(device, replacement):
    graph = torch.fx.Graph()
    node = graph.call_function(aten.multinomial.default, (graph.placeholder("x"), 5, replacement))
    with FakeTensorMode(allow_non_fake_inputs=True):
        node.meta["val"] = torch.empty(5, dtype=torch.int64, device=device)
    run = Run(Options.parse(ALLOW), Report("test"))
    audit(torch.fx.GraphModule({}, graph), run=run)
    guaranteed = device == "cpu" or not replacement
    expected = Verdict.DETERMINISTIC if guaranteed else Verdict.ALLOWED
    assert [d.verdict for d in run.report.decisions] == [expected]
