"""What the audit lets stay, and what it must not."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bicompile.passes.audit import reason_to_stay
from bicompile.report import REPORTS, Verdict

X = torch.rand(4, 6)
INDEX = torch.tensor([0, 1, 1, 3])
BYTES = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
COLUMNS = INDEX[:, None].expand(4, 6)

REFUSED = {
    "mm": (lambda: X @ X.t(), "mm"),
    "bmm": (lambda: torch.bmm(X[None], X.t()[None]), "bmm"),
    "softmax": (lambda: X.softmax(-1), "_softmax"),
    "distances": (lambda: torch.cdist(X, X), "_cdist_forward"),
    "singular values": (lambda: torch.linalg.svdvals(X), "_linalg_svd"),
    "sum of floats": (lambda: X.sum(), "sum"),
    "sum of integers as floats": (lambda: INDEX.sum(dtype=torch.float32), "sum"),
    "weighted count": (lambda: torch.bincount(INDEX, X[:, 0], 4), "bincount"),
    "running product of floats": (lambda: X.cumprod(0), "cumprod"),
    "unstable sort": (lambda: X.sort(-1)[0], "sort"),
    "product by index": (lambda: X.scatter_reduce(0, COLUMNS, X, "prod"), "scatter_reduce"),
    "sum by index": (lambda: X.index_put((INDEX,), X, accumulate=True), "index_put"),
    "random numbers": (lambda: torch.rand(3), "rand"),
    "random bits": (lambda: torch.bernoulli(X), "bernoulli"),
    "dropout": (lambda: torch.native_dropout(X, 0.5, True)[0], "native_dropout"),
}
STAYING = {
    "pointwise": lambda: torch.exp(X) * 2 + X.where(X > 0, 1.0),
    "integers": lambda: INDEX.sum() + torch.bincount(INDEX, minlength=4),
    "bytes multiplied": lambda: torch._int_mm(BYTES, BYTES.t()),
    "stable sort": lambda: torch.sort(X, stable=True)[0],
    "largest by index": lambda: X.scatter_reduce(0, COLUMNS, X, "amax"),
    "write by index": lambda: X.index_put((INDEX,), X),
    "extremes": lambda: X.amax(-1) + X.argmax(-1),
    "positions": lambda: torch.arange(6) * X,
    "moves": lambda: torch.cat([X.t().reshape(6, 4).clone(), X[:, :4].flip(0)]),
    "made": lambda: torch.full_like(X, 3.0),
    "assertion": lambda: torch.ops.aten._assert_async.msg(
        torch.ops.aten._is_all_true(X < 1), "too large"
    ),
}


def calls(function):
    """The calls of a function's graph, before any pass."""
    graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)().graph
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def named(node):
    return node.target._schema.name.split("::")[1]


@pytest.mark.parametrize("name", REFUSED)
def test_has_no_reason_to_stay(name):
    function, op = REFUSED[name]
    found = [n for n in calls(function) if named(n) == op]
    assert found
    assert all(reason_to_stay(n) is None for n in found)


@pytest.mark.parametrize("name", STAYING)
def test_stays_for_a_reason(name):
    found = calls(STAYING[name])
    assert found
    assert all(reason_to_stay(n) for n in found), [n.target for n in found]


def test_iota_and_cat_are_listed():
    """What arange and rotary embeddings become."""
    graph = torch.fx.Graph()
    iota = graph.call_function(torch.ops.prims.iota.default, (3,))
    cat = graph.call_function(torch.ops.aten.cat.default, ([iota],))
    assert reason_to_stay(iota).startswith("creation")
    assert reason_to_stay(cat).startswith("view or copy")


@torch.library.custom_op("other_package::exp", mutates_args=())
def exp_of_another(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum()


def test_the_name_of_an_allowed_op_is_not_enough():
    node = torch.fx.Graph().call_function(torch.ops.other_package.exp.default, (None,))
    assert reason_to_stay(node) is None


def test_what_is_only_deterministic_is_said_to_be_so():
    """The gradient of a weight adds up the rows of the batch."""
    REPORTS.clear()
    weight = torch.randn(6, 3, requires_grad=True)
    model = torch.compile(lambda x: (x @ weight).exp(), backend="batch_invariant")
    model(X).sum().backward()
    products = [d for r in REPORTS for d in r.decisions if d.target.startswith("aten.mm")]
    assert {d.verdict for d in products} == {Verdict.INVARIANT, Verdict.DETERMINISTIC}


def test_an_assertion_still_raises():
    """It stays in the graph, changes no value, and fails where its condition is False."""

    def checked(x):
        torch._assert_async(torch.ops.aten._is_all_true(x < 90), "too large")
        return x * 2

    compiled = torch.compile(checked, backend="batch_invariant")
    x = torch.rand(5, 6)
    assert torch.equal(compiled(x), x * 2)
    x[4, 3] = 100
    with pytest.raises(RuntimeError, match="too large"):
        compiled(x)
