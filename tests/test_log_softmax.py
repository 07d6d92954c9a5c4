"""log_softmax and losses over classes: two numbers of each row are kept, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, rewrite, x

import bicompile
from bicompile import native, registry, testing
from bicompile.errors import UnsupportedDtype

KERNELS = registry.load_all()
SUM = KERNELS["sum"].op
HALF = torch.bfloat16
TOKENS = torch.tensor([[3, 0, 36, 7, 7], [1, 2, 0, 0, 35]])


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


def scored(logits, tokens):
    return F.log_softmax(logits.float(), -1).gather(-1, tokens[..., None]).squeeze(-1)


def next_tokens(logits, tokens):
    return F.log_softmax(logits, -1)[:, :-1].gather(-1, tokens[:, 1:, None])


def of_some_rows(logits, tokens):
    return F.log_softmax(logits, -1).gather(-1, tokens[:, :3, None])


# -------------------------------------------------------------------------------------- memory


def test_scores_need_no_memory_but_the_logits():
    """No tensor of the logits' size is made: neither the widened ones nor their logarithms."""
    logits, tokens = x(64, 50000, dtype=HALF), torch.arange(64)
    f = bicompile.compile(lambda a, b: F.log_softmax(a.float(), -1).gather(-1, b[:, None]))
    with torch.no_grad():
        f(logits, tokens)
        with torch.profiler.profile(profile_memory=True) as profile:
            f(logits, tokens)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert allocated < logits.nbytes / 10


def loss(h, w, labels):
    logits = F.linear(h, w)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100)


def score(h, w, tokens):
    logits = F.linear(h, w)
    chosen = logits.float().log_softmax(-1).gather(-1, tokens.clamp(min=0)[:, None])
    return chosen.square().mean()


@pytest.mark.parametrize("function", [loss, score], ids=lambda f: f.__name__)
def test_a_training_step_keeps_the_logits_and_their_gradient(function):
    """In bfloat16 both: of nothing else that has their size a tensor is made."""
    h, w = x(128, 16, dtype=HALF).requires_grad_(), x(20000, 16, dtype=HALF).requires_grad_()
    labels = torch.arange(128)
    labels[5] = -100
    f = bicompile.compile(function)

    def step():
        f(h, w, labels).backward()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    logits = 128 * 20000 * 2
    assert allocated < 2.5 * logits + 2 * w.nbytes


# -------------------------------------------------------------------------------------- bits


def test_scores_do_not_depend_on_the_batch():
    f = bicompile.compile(scored)
    logits, tokens = x(8, 5, 1000, dtype=HALF), torch.arange(40).view(8, 5)
    with torch.no_grad():
        whole = f(logits, tokens)
        for start, stop in ((0, 1), (3, 4), (2, 7)):
            part = f(logits[start:stop], tokens[start:stop])
            testing.assert_same_bits(part, whole[start:stop], "rows alone")


@pytest.mark.parametrize("function", [scored, next_tokens, of_some_rows], ids=lambda f: f.__name__)
def test_a_trainer_scores_as_a_sampler_does(function):
    f, logits = bicompile.compile(function), x(2, 5, 37, dtype=HALF)
    with torch.no_grad():
        sampled = f(logits, TOKENS)
    found, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    trained = f(found, TOKENS)
    testing.assert_same_bits(trained, sampled, "with gradients")
    trained.float().sum().backward()
    function(expected, TOKENS).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad.to(HALF), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", [loss, score], ids=lambda f: f.__name__)
def test_a_sum_of_one_number_is_that_number(function):
    """With and without the fusion, the gradients have the same bits."""
    labels = torch.tensor([3, 36, -100, 7])
    results = []
    for disable in ("", "fuse"):
        torch._dynamo.reset()
        h, w = x(4, 16, dtype=HALF).requires_grad_(), x(37, 16, dtype=HALF).requires_grad_()
        options = {"disable": disable} if disable else {}
        bicompile.compile(function, options=options)(h, w, labels).backward()
        results.append((h.grad, w.grad))
    testing.assert_same_bits(*results, "fused")


def test_rows_of_nothing():
    for shape in ((3, 0), (0, 3)):
        leaf = x(*shape).requires_grad_()
        out = bicompile.compile(lambda t: t.log_softmax(-1))(leaf)
        out.sum().backward()
        assert out.shape == leaf.grad.shape == shape
    assert bicompile.compile(lambda t: t.log_softmax(0))(torch.tensor(3.0)) == 0


@pytest.mark.parametrize("shape", [(3, 5), (3, 0)])
def test_float64_is_refused_or_let_through(shape, monkeypatch):
    """With CI in the environment, which makes Inductor stricter."""
    monkeypatch.setenv("CI", "true")
    logits = x(*shape).double()
    with pytest.raises(UnsupportedDtype, match=r"float64"):
        bicompile.compile(lambda t: t.log_softmax(-1))(logits)
    torch._dynamo.reset()
    f = bicompile.compile(lambda t: t.log_softmax(-1), options={"unsupported": "allow"})
    torch.testing.assert_close(f(logits), logits.log_softmax(-1))


# -------------------------------------------------------------------------------------- the sum


def one_hot(value, place, other=0.0, dim=1, keepdim=False):
    classes = torch.arange(37) if dim == 1 else torch.arange(37)[:, None]
    return torch.where(classes == place, value, other).sum(dim, keepdim=keepdim)


@pytest.mark.parametrize(
    "function",
    [
        lambda v, i: one_hot(v[:, None], i[:, None]),
        lambda v, i: one_hot(v[:, None], i[:, None], keepdim=True),
        lambda v, i: one_hot(v[None], i[None], dim=0),
        lambda v, i: one_hot(v[:, None], i[:, None]).sum(-1),
    ],
    ids=["last axis", "axis kept", "first axis", "a sum of all that follows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_row_with_one_number(function, dtype):
    value = x(7, dtype=dtype)
    value[2], value[3], value[4] = torch.nan, torch.inf, -0.0
    place = torch.tensor([0, 36, 5, 6, 7, -1, 37])
    gm, report, result, expected = rewrite(function, value, place)
    assert any(d.became == "aten.where.self" for d in report.decisions)
    torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=0)
    testing.assert_same_bits(result.signbit(), expected.signbit(), "the sign of zero")
    assert count(gm, SUM) == (1 if result.dim() == 0 else 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda v, i: one_hot(v[:, None], i[:, None], 1.0),
        lambda v, i: one_hot(v[:, None], i[:, None], v[:, None]),
        lambda v, i: one_hot(v.outer(torch.arange(37.0)), i[:, None]),
        lambda v, i: one_hot(v[:, None], i.outer(torch.arange(37))),
        lambda v, i: torch.where(torch.arange(1, 38) == i[:, None], v[:, None], 0.0).sum(1),
        lambda v, i: torch.where(torch.arange(37) <= i[:, None], v[:, None], 0.0).sum(1),
        lambda v, i: torch.where(torch.arange(37) == i[:, None], v[:, None], 0.0).sum(0),
        lambda v, i: torch.where(torch.arange(37) == i[:, None], v[:, None], 0.0).sum(),
    ],
    ids="ones other number places one less another-axis all".split(),
)
def test_a_row_with_more_numbers_is_summed(function):
    gm, _, result, expected = rewrite(function, x(7), torch.tensor([0, 36, 5, 6, 7, -1, 37]))
    assert count(gm, SUM) == 1
    torch.testing.assert_close(result, expected)


# -------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(11,), (6, 11), (3, 11, 4, 2)], ids=str)
def test_losses_over_classes(shape, weighted, reduction):
    dim = min(len(shape) - 1, 1)
    labels = torch.arange(x(*shape).select(dim, 0).numel()).view(x(*shape).select(dim, 0).shape)
    labels = torch.where(labels == 2, -7, labels % 11)
    weight = x(11).abs() if weighted else None
    results = []
    for compile in (lambda f: f, bicompile.compile):
        torch._dynamo.reset()
        logits = x(*shape).requires_grad_()
        function = compile(
            lambda t: F.cross_entropy(t, labels, weight, ignore_index=-7, reduction=reduction)
        )
        out = function(logits)
        out.sin().sum().backward()
        results.append((out.detach(), logits.grad))
    torch.testing.assert_close(*results)
