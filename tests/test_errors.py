"""Every error class: provoked as a user would, its text compared."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bicompile
from bicompile import api, capture, errors
from bicompile.options import Options
from bicompile.testing import assert_batch_invariant

X = torch.randn(4, 8)


def run(function, *args, backend="batch_invariant", **kwargs):
    with torch.no_grad():
        return torch.compile(function, backend=backend, **kwargs)(*args)


def test_unsupported_op():
    def model(x):
        y = x + 1
        return torch.linalg.svdvals(y)

    with pytest.raises(errors.UnsupportedOp) as caught:
        run(model, X)
    text = str(caught.value)
    assert "aten._linalg_svd.default cannot be made batch-invariant" in text
    assert "given: float32[4, 8]" in text
    assert "test_errors.py:" in text and "return torch.linalg.svdvals(y)" in text
    assert 'options={"unsupported": "allow"}' in text


def test_unsupported_op_is_let_through_by_an_option():
    out = run(torch.linalg.svdvals, X, options={"unsupported": "allow"})
    torch.testing.assert_close(out, torch.linalg.svdvals(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_unsupported_dtype(dtype):
    with pytest.raises(errors.UnsupportedDtype) as caught:
        run(lambda x: x @ x.mT, X.to(dtype))
    text = str(caught.value)
    assert f"aten.mm.default has no invariant kernel for {dtype}" in text
    assert "accepted: torch.float32, torch.bfloat16, torch.float16" in text
    assert "lambda x: x @ x.mT" in text


def test_a_sum_in_float64():
    """Of float32: the dtype of the result is refused where the graph is compiled."""
    with pytest.raises(errors.UnsupportedDtype, match="float64"):
        run(lambda x: x.sum(-1, dtype=torch.float64), X)


def test_unsupported_dtype_in_attention():
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    with pytest.raises(errors.UnsupportedDtype, match="float64"):
        run(lambda q: F.scaled_dot_product_attention(q, q, q), q)


def test_dropout_in_training_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with pytest.raises(errors.RandomOp) as caught:
        run(model, X)
    assert "draws random numbers by position in the batch" in str(caught.value)
    assert "call model.eval()" in str(caught.value)
    run(model.eval(), X)


def test_dropout_in_attention():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(errors.RandomOp):
        run(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), q)


def test_random_ops_are_let_through_by_an_option():
    assert run(torch.rand_like, X, options={"random": "allow"}).shape == X.shape


def test_batch_statistics():
    with pytest.raises(errors.BatchStatistics, match="takes its statistics over the batch"):
        run(nn.BatchNorm1d(8).train(), X)
    run(nn.BatchNorm1d(8).eval(), X)


def test_batch_statistics_that_are_not_kept():
    with pytest.raises(errors.BatchStatistics):
        run(lambda x: F.batch_norm(x, None, None, training=True), torch.randn(3, 4, 5))


def test_batch_statistics_of_the_op_of_export():
    stats = [torch.ones(8) for _ in range(4)]
    with pytest.raises(errors.BatchStatistics, match="_batch_norm_with_update"):
        run(lambda x: torch.ops.aten._batch_norm_with_update(x, *stats, 0.1, 1e-5)[0], X)


def test_graph_break():
    def model(x):
        y = x + 1
        print("between the graphs")
        return y * 2

    with pytest.raises(errors.GraphBreak) as caught:
        run(model, X)
    assert "does not fit in one graph" in str(caught.value)
    assert 'print("between the graphs")' in str(caught.value)
    torch._dynamo.reset()
    torch.testing.assert_close(run(model, X, options={"graph_breaks": "allow"}), (X + 1) * 2)


def test_recompile_limit():
    compiled = torch.compile(lambda x: x * 2, backend="batch_invariant", dynamic=False)
    limit = torch._dynamo.config.patch(recompile_limit=3)
    with limit, pytest.raises(errors.RecompileLimit) as caught:
        for size in range(2, 9):
            compiled(torch.ones(size))
    assert "more than 2 graphs" in str(caught.value)
    assert "torch._dynamo.config.recompile_limit" in str(caught.value)


def test_suppressed_errors():
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    suppressed = torch._dynamo.config.patch(suppress_errors=True)
    refused = pytest.raises(errors.SuppressedErrors, match="a refused graph would run eagerly")
    with suppressed, refused:
        capture.check(graph, [X], Options())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fuell": 1}, "unknown value 1 for option 'fuell'"),
        ({"random": "yes"}, "accepted: error, allow"),
        ({"disable": "fuze"}, "accepted: canonicalize, replace, fuse, deduplicate"),
        ({"fuel": -1}, "a number of rewrites >= 0"),
        ({"schedules": "all"}, "accepted: certified, single"),
    ],
)
def test_unknown_option(options, text):
    with pytest.raises(errors.UnknownOption) as caught:
        run(torch.sin, X, options=options)
    assert text in str(caught.value)


def test_unknown_mode():
    with pytest.raises((errors.UnknownOption, RuntimeError), match="mode"):
        bicompile.compile(torch.sin, mode="fast")(X)


def test_unsupported_device():
    meta = torch.empty(4, 8, device="meta")
    with pytest.raises(errors.UnsupportedDevice, match="device type 'meta'"):
        run(lambda x: x @ x.mT, meta)


def test_gradient_of_a_mask():
    q, mask = torch.randn(1, 2, 4, 8), torch.zeros(4, 4, requires_grad=True)

    def attend(q, mask):
        return F.scaled_dot_product_attention(q, q, q, mask).sum()

    with pytest.raises(errors.UnsupportedGradient, match="the mask of scaled_dot_product"):
        torch.compile(attend, backend="batch_invariant")(q, mask).backward()


def test_gradient_through_an_op_without_backward():
    table = nn.Embedding(5, 8, scale_grad_by_freq=True)
    with pytest.raises(errors.UnsupportedGradient) as caught:
        torch.compile(table, backend="batch_invariant")(torch.tensor([1, 1])).sum().backward()
    assert "aten.embedding_dense_backward.default" in str(caught.value)
    assert "torch.no_grad()" in str(caught.value)


def test_unsafe_setting():
    model = nn.Linear(8, 8)
    model.config = type("Config", (), {"_attn_implementation": "flex_attention"})()
    with pytest.raises(errors.UnsafeSetting) as caught:
        bicompile.compile(model)
    assert "attn_implementation is flex_attention" in str(caught.value)
    assert 'load the model with attn_implementation="sdpa"' in str(caught.value)


def test_attention_that_cannot_be_replaced():
    with pytest.raises(errors.UnsafeSetting, match="that of Linear: this model is not a transf"):
        bicompile.use_attention(nn.Linear(8, 8))
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, vocab_size=9))
    with pytest.raises(errors.UnsafeSetting) as caught:
        bicompile.use_attention(model)
    assert "that of DebertaV2Model: this model computes attention of its own" in str(caught.value)
    assert "docs/attention.md" in str(caught.value)
    assert model.config._attn_implementation == "eager"


def test_padding_without_positions_is_warned_of():
    @bicompile.compile
    def model(x, attention_mask=None):
        return x * attention_mask[..., None]

    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    api._warn_once.cache_clear()  # another test may have been told
    with pytest.warns(UserWarning, match="without position_ids"):
        model(torch.randn(2, 3, 4), attention_mask=mask)


TEXTS = {
    errors.CompilerNotFound: ({"tried": ["g++", "clang++"]}, "tried: g++, clang++"),
    errors.CompilationFailed: ({"command": "g++ x", "output": "boom"}, "command: g++ x\nboom"),
    errors.ModelNotFound: ({"model": "x/y", "reason": "no such folder"}, "x/y: no such folder"),
    errors.HashMismatch: ({"file": "m", "expected": "a", "actual": "b"}, "expected: sha256 a"),
    errors.NetworkUnavailable: ({"model": "m", "output": "timed out"}, "cannot download m"),
    errors.DamagedCertificate: (
        {"file": "h100.json", "reason": "it is cut off"},
        "the certificate h100.json is refused: it is cut off",
    ),
    errors.GpuNotFound: ({}, "PyTorch sees no NVIDIA GPU"),
    errors.SweepFailed: ({"problem": "mm", "output": "boom"}, "stopped at mm\nboom"),
    errors.Untraceable: ({"reason": "a branch"}, "captured as one graph: a branch"),
    errors.WrongInputs: ({"reason": "no b", "given": "float32[2]"}, "these inputs: no b"),
    errors.ProgramNotFound: (
        {"name": "m:f", "reason": "no m", "todo": "check"},
        "cannot explain m:f: no m",
    ),
    errors.GraphTooLarge: ({"rows": 501, "limit": 500}, "has 501 rows"),
    errors.BrowserNotFound: (
        {"purpose": "draw", "tried": ["chromium"], "file": "a.html"},
        "tried: chromium",
    ),
    errors.LockUnreadable: ({"file": "a.lock", "reason": "empty"}, "lock file a.lock: empty"),
    errors.LockDiffers: ({"file": "a.lock", "differences": "pin: torch"}, "a.lock:\npin: torch"),
    errors.LostDecision: ({"node": "mm", "op": "aten.mm.default"}, "became of mm (aten.mm"),
    errors.CoverageUnavailable: ({"missing": "pebble"}, "pebble is not installed"),
    errors.RegistrationError: ({"name": "mm", "reason": "taken"}, "cannot register mm: taken"),
    errors.UnknownSubject: ({"name": "nm", "accepted": ["mm"]}, "no op or model 'nm'"),
    errors.StateDiffers: (
        {"file": "a.db", "differences": "torch: 1, here 2"},
        "in a.db are not of this program: torch: 1, here 2",
    ),
}


@pytest.mark.parametrize("cls", TEXTS)
def test_texts_of_errors_outside_a_graph(cls):
    fields, text = TEXTS[cls]
    error = cls(**fields)
    assert text in str(error)
    assert "next:" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)


def test_what_cannot_be_tested_for_invariance():
    def check(function, **more):
        assert_batch_invariant(
            function, lambda batch: {"x": torch.randn(batch, 3)}, backend="eager", **more
        )

    with pytest.raises(errors.NoBatchAxis, match="result 0"):
        check(lambda x: x.sum())
    with pytest.raises(errors.UnknownProperty, match=r"'padding'.*does not apply"):
        check(lambda x: x + 1, properties=["padding"])


def test_a_package_that_is_not_installed():
    error = errors.PackageNotFound(package="hypothesis", need="the search", extra="testing")
    assert "the search needs the package hypothesis" in str(error)
    assert 'pip install "bicompile[testing]"' in str(error)


def test_errors_of_a_graph_can_be_sent_to_another_process():
    with pytest.raises(errors.UnsupportedOp) as caught:
        run(lambda x: torch.linalg.svdvals(x), X)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is errors.UnsupportedOp
    assert str(again) in str(caught.value)


def test_every_error_has_a_case():
    source = Path(__file__).read_text()
    missing = [c.__name__ for c in errors.catalogue() if f"errors.{c.__name__}" not in source]
    assert not missing


def test_errors_state_the_next_step():
    for cls in errors.catalogue():
        assert cls.next and cls.__doc__
