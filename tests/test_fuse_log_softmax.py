"""Log-probabilities of chosen tokens: what is joined, what is not, and no bit changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import count, rewrite, x

import bicompile
from bicompile import native, registry, testing

KERNELS = registry.load_all()
JOINED, WHOLE = KERNELS["log_softmax_gather"].op, KERNELS["log_softmax"].op
HALF = torch.bfloat16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = torch.tensor([[3, 0, 36, 7, 7], [1, 2, 0, 0, 35]])


def scored(logits, tokens):
    return F.log_softmax(logits.float(), -1).gather(-1, tokens[..., None]).squeeze(-1)


def scored_as_they_are(logits, tokens):
    return torch.gather(logits.log_softmax(2), 2, tokens.unsqueeze(2))


def next_tokens(logits, tokens):
    return F.log_softmax(logits, -1)[:, :-1].gather(-1, tokens[:, 1:, None])


def of_some_rows(logits, tokens):
    return F.log_softmax(logits, -1).gather(-1, tokens[:, :3, None])


def along_the_first_axis(logits, tokens):
    return F.log_softmax(logits[0], 0).gather(0, tokens[:, :1].expand(-1, logits.shape[2]))


JOIN = (scored, scored_as_they_are, next_tokens, of_some_rows, along_the_first_axis)


@pytest.mark.parametrize("function", JOIN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_is_joined(function, dtype):
    tokens = TOKENS % 5 if function is along_the_first_axis else TOKENS
    gm, report, result, expected = rewrite(function, x(2, 5, 37, dtype=dtype), tokens)
    assert (count(gm, JOINED), count(gm, WHOLE)) == (1, 0)
    assert any("log_softmax_gather" in (d.became or "") for d in report.decisions)
    read = gm.graph.find_nodes(op="call_function", target=JOINED)[0].args[0]
    assert read.meta["val"].dtype is dtype
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "function",
    [
        lambda t, i: (p := t.log_softmax(-1)).gather(-1, i[..., None]) + p.sum(),
        lambda t, i: t.log_softmax(1).gather(2, i[..., None]),
        lambda t, i: t.log_softmax(-1)[..., :36].gather(-1, i[..., None].clamp(max=35)),
        lambda t, i: t.softmax(-1).gather(-1, i[..., None]),
    ],
    ids=["used twice", "along another axis", "of a part of the row", "softmax"],
)
def test_is_not_joined(function):
    gm, _, result, expected = rewrite(function, x(2, 5, 37), TOKENS)
    assert count(gm, JOINED) == 0
    torch.testing.assert_close(result, expected)


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 33, 4096, 4097, 50257])
def test_no_bit_changes(columns, dtype, device):
    logits = x(7, columns, dtype=dtype).to(device)
    logits[2, columns // 2], logits[3, 0], logits[4] = torch.nan, torch.inf, -torch.inf
    tokens = torch.arange(21, device=device).view(7, 3) * 1009 % columns
    for out in (dtype, torch.float32):
        joined = torch.ops.bicompile.log_softmax_gather(logits, 1, tokens, out)
        whole = torch.ops.bicompile.log_softmax(logits, 1, out)
        testing.assert_same_bits(joined, whole.gather(1, tokens), "joined")


def test_a_token_outside_the_vocabulary_is_an_error():
    for token in (-1, 37):
        with pytest.raises(RuntimeError, match="index is out of range"):
            torch.ops.bicompile.log_softmax_gather(x(1, 37), 1, torch.tensor([[token]]), HALF)


def test_the_logits_are_all_that_is_in_memory():
    """No tensor of the logits' size is made: neither the widened ones nor their logarithms."""
    logits, tokens = x(64, 50000, dtype=HALF), torch.arange(64)
    f = bicompile.compile(lambda a, b: F.log_softmax(a.float(), -1).gather(-1, b[:, None]))
    with torch.no_grad():
        f(logits, tokens)
        with torch.profiler.profile(profile_memory=True) as profile:
            f(logits, tokens)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    assert allocated < logits.nbytes / 10


def test_scores_do_not_depend_on_the_batch():
    f = bicompile.compile(scored)
    logits, tokens = x(8, 5, 1000, dtype=HALF), torch.arange(40).view(8, 5)
    with torch.no_grad():
        whole = f(logits, tokens)
        for start, stop in ((0, 1), (3, 4), (2, 7)):
            part = f(logits[start:stop], tokens[start:stop])
            testing.assert_same_bits(part, whole[start:stop], "rows alone")


@pytest.mark.parametrize("function", [next_tokens, of_some_rows], ids=lambda f: f.__name__)
def test_joined_only_without_gradients_and_no_bit_changes(function):
    f, logits = bicompile.compile(function), x(2, 5, 37, dtype=HALF)
    with torch.no_grad():
        joined = f(logits, TOKENS)
    found, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    whole = f(found, TOKENS)
    testing.assert_same_bits(whole, joined, "with gradients")
    whole.float().sum().backward()
    function(expected, TOKENS).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad.to(HALF), rtol=1e-2, atol=1e-2)
