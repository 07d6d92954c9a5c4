"""Every rule fires once on a graph of its own op and keeps shapes and values."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rewriting import count, rewrite, x
from torch._inductor import lowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bicompile
from bicompile import registry
from bicompile.options import Options
from bicompile.passes.canonicalize import canonicalize
from bicompile.passes.replace import replace
from bicompile.passes.rules import OVER_THE_BATCH, RULES
from bicompile.pipeline import OPTIONAL, Run
from bicompile.report import Report

registry.load_all()
importlib.import_module("transformers.integrations.moe")  # defines an op that has a rule
aten = torch.ops.aten
ours = torch.ops.bicompile


V, M, N, B = x(8), x(5, 8), x(8, 6), x(3, 5, 8)
C1, C2, C3, C4 = x(6), x(3, 5, 5), x(5), x(5, 5)
PLACES = torch.tensor([3, 1, 3])
RULE_CASES = {
    aten.mm.default: (torch.mm, M, N),
    aten.bmm.default: (torch.bmm, B, B.mT),
    aten.addmm.default: (lambda a, b: torch.addmm(C1, a, b, beta=0.5, alpha=2), M, N),
    aten.baddbmm.default: (lambda a: torch.baddbmm(C2, a, a.mT, beta=0.5, alpha=2), B),
    aten.mv.default: (torch.mv, M, V),
    aten.dot.default: (torch.dot, V, V),
    aten.vdot.default: (torch.vdot, V, V),
    aten.addmv.default: (lambda a, b: torch.addmv(C3, a, b, beta=2, alpha=3), M, V),
    aten.addbmm.default: (lambda a: torch.addbmm(C4, a, a.mT, beta=2, alpha=3), B),
    aten.convolution.default: (
        lambda t, w: F.conv2d(t, w, padding="same", groups=2, dilation=2),
        x(2, 4, 9, 8),
        x(4, 2, 3, 2),
    ),
    aten.convolution_backward.default: (
        lambda g, t, w: tuple(
            aten.convolution_backward(
                g, t, w, [4], [2, 1], [1, 1], [1, 2], False, [0, 0], 2, [True, True, True]
            )
        ),
        x(30, 4, 5, 6),
        x(30, 4, 9, 8),
        x(4, 2, 3, 3),
    ),
    aten.sum.default: (torch.sum, B),
    aten.sum.dim_IntList: (lambda t: t.sum((0, -1), keepdim=True), B),
    aten.mean.default: (torch.mean, B),
    aten.mean.dim: (lambda t: t.mean(1), B),
    aten.prod.default: (torch.prod, V),
    aten.prod.dim_int: (lambda t: t.prod(1), B),
    aten.var.correction: (lambda t: t.var(-1, correction=0), B),
    aten.std.correction: (torch.std, B),
    aten.var_mean.correction: (lambda t: torch.var_mean(t, 0), B),
    aten.logsumexp.default: (lambda t: t.logsumexp((0, 1)), B),
    aten.linalg_vector_norm.default: (lambda t: torch.linalg.vector_norm(t, 3, 1), B),
    aten._foreach_norm.Scalar: (lambda t: tuple(torch._foreach_norm([t], 1)), B),
    aten.norm.Scalar: (lambda t: aten.norm.Scalar(t, 2), B),
    aten.norm.ScalarOpt_dim: (lambda t: aten.norm.ScalarOpt_dim(t, 1, [1]), B),
    aten.norm.ScalarOpt_dim_dtype: (
        lambda t: aten.norm.ScalarOpt_dim_dtype(t, 2, [1], False, dtype=torch.float32),
        B,
    ),
    aten.linalg_solve_triangular.default: (
        lambda t: torch.linalg.solve_triangular(t[..., :5] + 9, t, upper=True),
        B,
    ),
    aten.cumsum.default: (lambda t: t.cumsum(1), B),
    aten.cumprod.default: (lambda t: t.cumprod(-1), B),
    aten.logcumsumexp.default: (lambda t: t.logcumsumexp(0), B),
    aten._softmax.default: (lambda t: F.softmax(t, 1), B),
    aten.native_layer_norm.default: (nn.LayerNorm((5, 8)), B),
    aten.native_group_norm.default: (nn.GroupNorm(2, 8), x(3, 8, 5)),
    aten._grouped_mm.default: (
        lambda a, w, o: aten._grouped_mm(a, w, o),
        x(5, 8, dtype=torch.bfloat16),
        x(3, 8, 16, dtype=torch.bfloat16),
        torch.tensor([1, 1, 5], dtype=torch.int32),
    ),
    "transformers.grouped_mm_fallback.default": (
        lambda a, w, o: torch.ops.transformers.grouped_mm_fallback(a, w, o),
        M,
        x(3, 8, 6),
        torch.tensor([1, 1, 5], dtype=torch.int32),
    ),
    "transformers.grouped_mm_fallback_backward.default": (
        lambda a, w, o, g: tuple(torch.ops.transformers.grouped_mm_fallback_backward(a, w, o, g)),
        M,
        x(3, 8, 6),
        torch.tensor([1, 1, 5], dtype=torch.int32),
        x(5, 6),
    ),
    aten.index_add.default: (lambda t, i: t.index_add(1, i, t[:, [0, 1, 2]], alpha=2), M, PLACES),
    aten.scatter_add.default: (
        lambda t, i: t.scatter_add(1, i.expand(5, 3), t[:, :3].contiguous()),
        M,
        PLACES,
    ),
    aten.scatter_reduce.two: (
        lambda t, i: t.scatter_reduce(1, i.expand(5, 3), t[:, :3], "sum", include_self=False),
        M,
        PLACES,
    ),
    aten.index_put.default: (
        lambda t, i: t.index_put((i - 5,), t[0], accumulate=True),
        M,
        PLACES,
    ),
    aten._unsafe_index_put.default: (
        lambda t, i: aten._unsafe_index_put(t, [i], t[:3], True),
        M,
        PLACES,
    ),
    aten.kthvalue.default: (lambda t: torch.kthvalue(t, 2, 0, True), M),
    aten.median.dim: (lambda t: tuple(torch.median(t, 1)), M),
    aten.median.default: (torch.median, M),
    aten.topk.default: (lambda t: tuple(torch.topk(t, 3)), M),
    aten._softmax_backward_data.default: (
        lambda g, y: aten._softmax_backward_data(g, y.softmax(1), 1, torch.float32),
        B,
        B,
    ),
    aten.native_layer_norm_backward.default: (
        lambda g, t, m: tuple(
            aten.native_layer_norm_backward(g, t, [8], m, m, V, V, [True, True, True])
        ),
        B,
        B * 2,
        x(3, 5, 1),
    ),
    aten.native_group_norm_backward.default: (
        lambda g, t, m: tuple(
            aten.native_group_norm_backward(g, t, m, m, C1, 3, 6, 7, 2, [True, True, True])
        ),
        x(3, 6, 7),
        x(3, 6, 7) * 2,
        x(3, 2),
    ),
    aten.native_batch_norm_backward.default: (
        lambda g, t, m: tuple(
            aten.native_batch_norm_backward(
                g, t, C1, None, None, m, m, True, 1e-5, [True, True, True]
            )
        ),
        x(1, 6, 7),
        x(1, 6, 7) * 2,
        x(6),
    ),
    aten.embedding_dense_backward.default: (
        lambda g, i: aten.embedding_dense_backward(g, i, 6, 3, False),
        x(5, 2, 8),
        torch.tensor([[1, 5], [3, 1], [0, 5], [1, 1], [5, 3]]),
    ),
    aten._native_batch_norm_legit.no_stats: (nn.InstanceNorm1d(8, affine=True), x(3, 8, 5)),
}


@pytest.mark.parametrize("target", RULE_CASES, ids=str)
def test_rule(target):
    function, *args = RULE_CASES[target]
    gm, report, result, expected = rewrite(function, *args)
    became = [d for d in report.decisions if d.became == str(RULES[target].kernel.op)]
    assert len(became) == 1, report.decisions
    assert count(gm, RULES[target].kernel.op) == 1
    for node in gm.graph.nodes:  # what a rule emits comes behind all decompositions
        if getattr(node.target, "namespace", "") in ("aten", "prims"):
            assert node.target in lowering.lowerings, node.target
    flat, flat_expected = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    for a, e in zip(flat, flat_expected, strict=True):
        torch.testing.assert_close(a, e)


def test_every_rule_has_a_case():
    assert set(RULE_CASES) | set(OVER_THE_BATCH) == set(RULES)


def test_integer_sums_stay():
    gm, report, result, expected = rewrite(lambda t: (t > 0).sum(1), B)
    assert torch.equal(result, expected)
    assert count(gm, ours.sum.default) == 0
    assert "integers: exact in every order" in {d.reason for d in report.decisions}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_with_a_dtype(dtype):
    def narrow_and_wide(t):
        return t.sum(1, dtype=torch.bfloat16), t.sum(1, dtype=torch.float32)

    _, _, result, expected = rewrite(narrow_and_wide, x(5, 80, dtype=dtype))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda t, k: (t * 2).sum([0, 1], keepdim=k), True),
        (lambda t, k: (t * 2).mean(1, keepdim=k), True),
        (lambda t, k: (t * 2).sum([1, 2], keepdim=k), False),
        (lambda t, k: (t * 2).sum(keepdim=k, dim=[0, 1, 2]), False),
        (lambda t, k: t.sum(0, keepdim=k), False),
    ],
    ids="columns middle rows all given".split(),
)
def test_terms_are_written_side_by_side_for_a_gpu(function, moved, keepdim):
    with FakeTensorMode():
        t = torch.empty(3, 5, 8, device="cuda")
        gm = make_fx(lambda t: function(t, keepdim))(t)
        replace(gm, run=Run(Options.parse({}, passes=OPTIONAL), Report("test")))
        assert count(gm, aten.clone.default) == moved
        assert gm(t).shape == function(t, keepdim).shape


def test_mixed_dtypes_in_layer_norm():
    norm = nn.LayerNorm(8)
    _, _, result, expected = rewrite(lambda t: norm(t), x(5, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(result, expected)


# ------------------------------------------------------------------------------------ repeat_kv


def test_repeat_kv_is_undone():
    def attend(q, k, v):
        b, g, s, d = k.shape
        k, v = (t[:, :, None].expand(b, g, 2, s, d).reshape(b, 2 * g, s, d) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    gm, _, result, expected = rewrite(attend, x(2, 4, 6, 8), x(2, 2, 6, 8), x(2, 2, 6, 8))
    assert count(gm, aten.clone.default) == 0
    assert count(gm, aten.expand.default) == 0
    torch.testing.assert_close(result, expected)


def test_an_interleaved_repeat_is_left_alone():
    def attend(q, k, v):
        b, g, s, d = k.shape
        k, v = (t[:, None].expand(b, 2, g, s, d).reshape(b, 2 * g, s, d) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    _, _, result, expected = rewrite(attend, x(2, 4, 6, 8), x(2, 2, 6, 8), x(2, 2, 6, 8))
    torch.testing.assert_close(result, expected)


# ---------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("padding", [None, 2])
def test_the_gradient_of_a_tied_table_is_rounded_once(padding):
    """256 + 1 is 256 in bfloat16; with -256 from elsewhere it is 1, not 0."""
    ids = torch.tensor([[0, 2], [0, 1]])
    grad = torch.tensor([[256.0, 8], [1, 4]], dtype=torch.bfloat16)[..., None]
    elsewhere = torch.tensor([-256.0, 0.5, 2, 3], dtype=torch.bfloat16)[:, None]

    def model(table):
        rows = F.embedding(ids, table, padding_idx=padding)
        return (rows * grad).sum() + (table * elsewhere).sum()

    torch._dynamo.reset()
    table = torch.ones(4, 5, dtype=torch.bfloat16, requires_grad=True)
    bicompile.compile(model)(table).backward()
    expected = torch.tensor([1, 4.5, 2 if padding else 10, 3], dtype=torch.bfloat16)
    assert torch.equal(table.grad, expected[:, None].expand(4, 5))


# ---------------------------------------------------------------------------------- one matrix


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_meets_one_matrix_in_one_product(dynamic):
    """Rows that are apart in memory: `linear` makes of them a batch of products."""
    linear = nn.Linear(8, 16, bias=False).requires_grad_(False)
    for model in (
        lambda t: linear(t[:, -2:]),
        lambda t: torch.bmm(t, linear.weight.T.expand(3, 8, 16)),
    ):
        torch._dynamo.reset()
        t = x(3, 5, 8)
        if dynamic:
            torch._dynamo.mark_dynamic(t, 1)
        gm, _, _, _ = rewrite(model, t)
        assert (count(gm, ours.mm.default), count(gm, ours.bmm.default)) == (1, 0)
        whole = torch.compile(model, backend="batch_invariant", dynamic=dynamic)
        apart = bicompile.compile(model, options={"disable": "canonicalize"})
        assert torch.equal(whole(t), apart(t))


def test_one_matrix_without_terms():
    """No size follows from the others where there are no elements."""
    torch._dynamo.reset()
    product = bicompile.compile(lambda t, w: torch.bmm(t, w.expand(3, 0, 4)))
    assert torch.equal(product(x(3, 5, 0), x(0, 4)), torch.zeros(3, 5, 4))


def test_matrices_of_their_own_stay_a_batch():
    gm, _, _, _ = rewrite(lambda t, w: torch.bmm(t, w.view(3, 8, 4)), x(3, 5, 8), x(24, 4))
    assert (count(gm, ours.mm.default), count(gm, ours.bmm.default)) == (0, 1)


# --------------------------------------------------------------------------------- visible ranges


def _two_layers(device, keys=6, causal=False):
    """Two layers of attention with one mask and a third with another, after `canonicalize`."""

    def layers(q, k, mask, other):
        for m in (mask, mask, other):
            q = ours.sdpa(q, k, k, m, causal, 0.3)
        for m in (other, mask):
            q = ours.sdpa_backward(q, q, k, k, m, causal, 0.3)[0]
        return q

    with FakeTensorMode():
        q, k = (torch.empty(2, 4, n, 8, device=device) for n in (3, 6))
        masks = [torch.empty(2, 1, 3, keys, dtype=torch.bool, device=device) for _ in range(2)]
        gm = make_fx(layers)(q, k, *masks)
        before = [n.meta["val"] for n in gm.graph.find_nodes(op="output")[0].all_input_nodes]
        run = Run(Options.parse({}, passes=OPTIONAL), Report("test"), inference=True)
        canonicalize(gm, run=run)
    gm.graph.lint()
    (after,) = (n.meta["val"] for n in gm.graph.find_nodes(op="output")[0].all_input_nodes)
    assert after.shape == before[0].shape and after.stride() == before[0].stride()
    return gm


def test_layers_share_the_ranges_of_a_mask():
    gm = _two_layers("cuda")
    ranges = gm.graph.find_nodes(op="call_function", target=ours.visible_range.default)
    one, other = sorted(ranges, key=lambda n: n.args[0].name != "mask_1")
    read = [n.args[4] for n in gm.graph.nodes if n.target is ours.sdpa_visible.default]
    assert read == [one, one, other]
    read = [n.args[5] for n in gm.graph.nodes if n.target is ours.sdpa_backward_visible.default]
    assert read == [other, one]
    assert all(tuple(n.meta["val"].shape) == (2, 1, 3, 4) for n in ranges)
    assert count(gm, ours.sdpa.default) == count(gm, ours.sdpa_backward.default) == 0


@pytest.mark.parametrize(
    "setting",
    [{"device": "cpu"}, {"device": "cuda", "keys": 1}, {"device": "cuda", "causal": True}],
)
def test_attention_stays_whole_without_ranges_to_share(setting):
    gm = _two_layers(**setting)
    assert count(gm, ours.sdpa.default) == 3
    assert count(gm, ours.visible_range.default) == 0


# ------------------------------------------------------------------------------------ the runner


def test_fuel_bounds_the_rewrites():
    def three(t):
        return t.softmax(1).sum(1), t.mean(1)

    for fuel in range(4):
        _, report, _, _ = rewrite(three, M, fuel=fuel, unsupported="allow")
        assert len([d for d in report.decisions if d.became]) == fuel


def test_a_pass_can_be_left_out():
    def norm(t):
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6)

    gm, _, _, _ = rewrite(norm, x(3, 64), disable="fuse")
    assert count(gm, ours.mean.default) == 1


def test_every_node_has_a_decision():
    gm, report, _, _ = rewrite(lambda t: F.gelu(t @ N).softmax(-1), M)
    decided = {d.node for d in report.decisions}
    calls = {n.name for n in gm.graph.nodes if n.op == "call_function"}
    left = {n for n in calls - decided if not n.startswith(tuple(k for k in registry.KERNELS))}
    assert not left
    assert all(d.line and "test_rules.py" in d.line for d in report.decisions if d.became)
