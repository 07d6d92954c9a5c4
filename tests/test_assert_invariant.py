"""`assert_batch_invariant`: what it finds, how small it makes it, and what it lets pass."""

from __future__ import annotations

import ast
import os
import re
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from bicompile import errors, testing
from bicompile.testing import PROPERTIES, InvarianceViolation, assert_batch_invariant, search


def rows(*shape, dtype=torch.float32):
    return lambda batch: {"x": torch.randn(batch, *shape).to(dtype)}


def example_of(message):
    """What the message says to reproduce it with."""
    return ast.literal_eval(re.search(r"example=(\{.*\})", str(message))[1])


def found(function, make_inputs, name, **options):
    """The message of the violation of a property, which must also be reproduced by its example."""
    with pytest.raises(InvarianceViolation) as caught:
        assert_batch_invariant(function, make_inputs, backend="eager", properties=[name], **options)
    with pytest.raises(InvarianceViolation, match=f"^{name}: "):
        options.pop("max_examples", None)
        example = example_of(caught.value)
        assert_batch_invariant(function, make_inputs, backend="eager", example=example, **options)
    return str(caught.value)


# --------------------------------------------------------------------------- planted violations


class Counting:
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls


def from_the_batch_size(x):
    return x * (1 if len(x) < 6 else 1 + 2**-20)


def from_the_position(x):
    return x + (torch.arange(len(x)) == 2)[:, None] * 2.0**-20


def from_the_first_row(x):
    return x + x[:1] * 2.0**-20


def from_nan(x):
    return x + 0.0 * x.sum()


def from_alignment(x):
    return x * (1 if x.storage_offset() % 4 == 0 else 1 + 2**-20)


def from_threads(x):
    return x * (1 if torch.get_num_threads() < 3 else 1 + 2**-20)


class FromTheMode(torch.nn.Module):
    """Another function where a gradient could be asked for."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale * (1 + 2**-20 if torch.is_grad_enabled() else 1)


PLANTED = {
    "batch size": (from_the_batch_size, {"batch": 6, "count": 1, "start": 0}),
    "position": (from_the_position, {"batch": 3}),
    "permutation": (from_the_position, {"batch": 3}),
    "neighbours": (from_nan, {"batch": 2, "row": 0}),
    "strides": (from_alignment, {"batch": 1}),
    "repeated run": (Counting(), {"batch": 1}),
    "threads": (from_threads, {"batch": 1, "threads": 3}),
    "train and eval": (FromTheMode(), {"batch": 1}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_finds_the_smallest_case(name):
    function, smallest = PLANTED[name]
    example = example_of(found(function, rows(4), name))
    assert {key: example[key] for key in smallest} == smallest
    assert example["property"] == name


def test_every_row_property_has_a_planted_violation():
    others = {"other process", "static and dynamic", "other schedule", *LANGUAGE}
    assert set(PLANTED) | others == set(PROPERTIES)


def test_random_neighbours_are_other_rows():
    def of_integers(ids):
        return from_the_first_row(ids.float())

    message = found(of_integers, lambda b: {"ids": torch.randint(99, (b, 4))}, "neighbours")
    assert example_of(message)["neighbours"] == "random"


def test_a_length_is_made_small():
    def long_rows_add_up_otherwise(x):
        return x * (1 if x.shape[1] < 11 or len(x) < 2 else 1 + 2**-20)

    message = found(
        long_rows_add_up_otherwise, lambda batch, length: {"x": torch.randn(batch, length)},
        "batch size",
    )  # fmt: skip
    assert example_of(message)["length"] == 11
    assert example_of(message)["batch"] == 2


def test_message_holds_both_patterns_and_the_module():
    class Planted(torch.nn.Module):
        def forward(self, x):
            return from_the_batch_size(x)

    model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sequential(Planted(), torch.nn.Tanh()))
    message = found(model, lambda batch: {"input": torch.ones(batch, 3)}, "batch size")
    assert "it starts in 1.0 (Planted)" in message
    assert re.search(r"first at \[0, 0\]: 0x\w+ \(0\.64\d+\) is not 0x\w+ \(0\.64\d+\)", message)
    assert torch.__version__ in message


def test_dropout_and_mode_are_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
    model[1].train()
    assert_batch_invariant(model, rows_of_input_4, backend="eager", properties=["train and eval"])
    assert [m.training for m in model.modules()] == [False, False, True]
    assert model[1].p == 0.5


def test_statistics_of_the_batch_are_not_compared_with_inference():
    with pytest.raises(errors.UnknownProperty, match="it does not apply"):
        assert_batch_invariant(
            torch.nn.BatchNorm1d(4), rows_of_input_4, backend="eager", properties=["train and eval"]
        )


def rows_of_input_4(batch):
    return {"input": torch.randn(batch, 4)}


def test_finds_what_follows_the_process():
    here = os.getpid()

    def from_the_process(x):
        return x * (1 if os.getpid() == here else 1 + 2**-20)

    example = {"property": "other process", "batch": 1, "seed": 0}
    with pytest.raises(InvarianceViolation, match="other bits in another process than in the"):
        assert_batch_invariant(from_the_process, rows(4), backend="eager", example=example)


def test_what_cannot_be_sent_to_another_process_is_refused():
    gate = threading.Lock()

    def locked(x):
        with gate:
            return x

    with pytest.raises(errors.UnknownProperty, match=r"cannot be sent there: .*lock"):
        assert_batch_invariant(locked, rows(4), backend="eager", properties=["other process"])


# ------------------------------------------------------------------------- PyTorch as it comes

LINEAR = torch.nn.Linear(256, 256)
MODEL = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
PYTORCH = {
    "Linear": (lambda x: F.linear(x, LINEAR.weight), rows(256)),
    "feed-forward": (lambda x: MODEL(x), rows(64)),
    "RMSNorm": (torch.nn.RMSNorm(576), rows(576)),
    "GELU": (F.gelu, lambda batch: {"input": torch.randn(batch, 7)}),
    "sum": (lambda x: x.sum(-1), rows(1000)),
    "mean of tokens": (lambda x: x.mean(1), rows(33, 20)),
    "logsumexp": (lambda x: x.logsumexp(-1), rows(1000)),
    "convolution": (lambda x: F.conv1d(x, torch.ones(8, 16, 3)), rows(16, 50)),
    "BatchNorm in training": (torch.nn.BatchNorm1d(8), lambda b: {"input": torch.randn(b, 8, 3)}),
}


def test_plain_pytorch_is_not_invariant():
    """Which of them depends on the CPU's instructions; nine of nine with AVX-512."""
    broken = []
    with testing.num_threads(2):
        for name, subject in PYTORCH.items():
            try:
                assert_batch_invariant(*subject, backend="eager")
            except InvarianceViolation:
                broken.append(name)
    assert len(broken) >= 6


def test_after_a_gpu_is_lost_nothing_is_tried(monkeypatch):
    """Each later call would fail, too: what failed first is told."""
    calls = iter(range(9))

    def fail(x):
        raise RuntimeError(f"misaligned address, call {next(calls)}")

    monkeypatch.setattr(search, "gpu_is_lost", lambda: True)
    with pytest.raises(RuntimeError, match="call 0"):
        assert_batch_invariant(fail, rows(8), backend="eager", properties=["batch size"])


@pytest.mark.parametrize("name", ["Linear", "feed-forward"])
def test_default_compiled_pytorch_is_not_invariant(name):
    with pytest.raises(InvarianceViolation):
        assert_batch_invariant(*PYTORCH[name], backend="inductor")


@pytest.mark.parametrize("name", ["Linear", "feed-forward", "RMSNorm", "sum"])
def test_ours_is_invariant(name):
    assert_batch_invariant(*PYTORCH[name], max_examples=6)


def test_ours_is_invariant_in_another_process_and_in_training():
    assert_batch_invariant(
        MODEL, rows_of_input_64, properties=["other process", "train and eval"], max_examples=1
    )


def rows_of_input_64(batch):
    return {"input": torch.randn(batch, 64)}


# ------------------------------------------------------------------------------ limits of time


def test_a_search_whose_time_is_over_is_quiet():
    calls = []

    def shifted(x):
        calls.append(x)
        return x + len(x)

    options = {"backend": "eager", "properties": ["batch size"]}
    assert_batch_invariant(shifted, rows(4), max_seconds=0, **options)
    assert not calls
    with pytest.raises(InvarianceViolation) as caught:
        assert_batch_invariant(shifted, rows(4), **options)
    assert caught.value.example == example_of(caught.value)


def test_what_was_found_when_the_time_was_over_is_raised():
    calls = []

    def slow(x):
        calls.append(len(x))
        time.sleep(0.5)
        return x + len(x)

    options = {"backend": "eager", "properties": ["batch size"]}
    with pytest.raises(InvarianceViolation, match="batch size: other bits"):
        assert_batch_invariant(slow, rows(4), max_seconds=0.9, **options)
    assert len(calls) == 2


# --------------------------------------------------------------------------- language models

LANGUAGE = ("padding", "chunks", "decode", "cache", "prefix")


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batch, length):
    return {"input_ids": torch.randint(3, 97, (batch, length))}


@pytest.mark.parametrize("name", LANGUAGE)
def test_plain_language_model_is_not_invariant(name, llama):
    example = example_of(found(llama, tokens, name, max_batch_size=5, max_length=40))
    assert example["batch"] <= 2
    assert example["length"] <= 17


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "padding" else pytest.mark.soak) for name in LANGUAGE],
)
def test_our_language_model_is_invariant(name, llama):
    assert_batch_invariant(
        llama, tokens, properties=[name], max_batch_size=5, max_length=40, max_examples=3
    )


@pytest.fixture(scope="module")
def t5():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", LANGUAGE)
def test_plain_encoder_decoder_is_not_invariant(name, t5):
    def pairs(batch, length):
        ids = torch.randint(3, 97, (batch, length))
        return {"input_ids": ids.flip(1), "decoder_input_ids": ids}

    example = example_of(found(t5, pairs, name, max_batch_size=3, max_length=33))
    assert example["length"] <= 17


# ------------------------------------------------------------------------------------ arguments


def test_a_callable_stands_for_a_server():
    def client(function):
        return lambda **request: from_the_batch_size(function(**request))

    with pytest.raises(InvarianceViolation, match="batch size: other bits row 0 alone"):
        assert_batch_invariant(torch.tanh, lambda b: {"input": torch.randn(b, 3)}, backend=client)


def test_the_batch_may_be_another_axis():
    def make(batch):
        return {"x": torch.randn(5, batch), "shared": torch.randn(5, 1)}

    axes = {"x": 1, "shared": None, "return": 1}
    names = ["batch size", "position", "permutation", "neighbours", "strides", "repeated run"]
    assert_batch_invariant(
        lambda x, shared: x + shared, make, axes=axes, backend="eager", properties=names
    )
    with pytest.raises(InvarianceViolation):
        assert_batch_invariant(
            lambda x, shared: from_the_position(x.t()).t() + shared, make, axes=axes,
            backend="eager", properties=["position"],
        )  # fmt: skip


def test_results_need_a_batch_axis():
    with pytest.raises(errors.NoBatchAxis, match="result 0 of shape \\[\\] has no batch axis"):
        assert_batch_invariant(lambda x: x.sum(), rows(3), backend="eager")


@pytest.mark.parametrize("name", ["batchsize", "padding", "other schedule"])
def test_unknown_properties_are_named(name):
    with pytest.raises(errors.UnknownProperty, match=name):
        assert_batch_invariant(torch.tanh, rows(3), backend="eager", properties=[name])


def test_one_row_has_no_neighbours():
    assert_batch_invariant(torch.tanh, rows_of_input, backend="eager", max_batch_size=1)
    with pytest.raises(errors.UnknownProperty, match="neighbours"):
        assert_batch_invariant(
            torch.tanh, rows_of_input, backend="eager", max_batch_size=1, properties=["neighbours"]
        )


def rows_of_input(batch):
    return {"input": torch.randn(batch, 3)}


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    import sys

    for module in [m for m in sys.modules if m.split(".")[0] == "hypothesis"]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("properties", "search", "language"):
        monkeypatch.delitem(sys.modules, f"bicompile.testing.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(errors.PackageNotFound, match="bicompile\\[testing\\]"):
        testing.__getattr__("assert_batch_invariant")
