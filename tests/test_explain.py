"""Explain: every captured node has one fate, and what is lost on the way is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from explained import PROGRAMS, convolutional, explain, explained, llama, mlp

import bicompile
from bicompile import (
    dry_capture,
    errors,
    explanation_text,
    graph,
    inductor,
    native,
    provenance,
    schedules,
)
from bicompile.pipeline import Run
from bicompile.registry import load_all
from bicompile.report import Verdict

X = torch.randn(4, 8)
needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA"
)


def check_fates(explanation):
    """What holds of the fates of any program."""
    for found in explanation.graphs:
        names = [row.name for row in found.rows]
        assert names == [node.name for node in found.before]
        assert len(set(names)) == len(names)
        after = {node.name: node for node in found.after}
        read = {name for node in found.before for name in node.reads}
        for row in found.rows:
            assert set(row.became) <= set(after)
            assert (row.kind == "removed") == (not row.became)
            assert row.kind != "removed" or row.name not in read or row.verdict is Verdict.INVARIANT
            assert row.kind not in ("kept", "replaced") or row.op
            assert row.rule
            assert row.order or not row.op.startswith("bicompile.")
        told = {name for row in found.rows for name in row.became}
        for node in found.after:
            if node.target not in ("getitem", "invoke_subgraph"):
                assert node.name in told, f"{node.text} stands for no captured node"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_node_has_one_fate(name, monkeypatch):
    captured = []
    begin = provenance.begin

    def watch(gm):
        captured.extend(n.name for n in gm.graph.nodes if n.op == "call_function")
        return begin(gm)

    monkeypatch.setattr(provenance, "begin", watch)
    explanation = explain(name)
    check_fates(explanation)
    assert [row.name for row in explanation.rows] == captured


@pytest.mark.parametrize("pass_name", ["replace", "fuse", "audit"])
def test_a_lost_decision_is_seen(pass_name, monkeypatch):
    decide = Run.decide

    def forgetful(self, node, *args, **kwargs):
        if self.step != pass_name:
            decide(self, node, *args, **kwargs)

    monkeypatch.setattr(Run, "decide", forgetful)
    with pytest.raises(errors.LostDecision, match="no pass says what became of"):
        bicompile.explain(llama(layers=1), **PROGRAMS["llama"]()[2], dynamic=False)


def test_a_lost_origin_is_seen(monkeypatch):
    call = graph.Emit.__call__

    def nameless(self, *args, **kwargs):
        node = call(self, *args, **kwargs)
        node.meta.pop(graph.ORIGINS, None)
        return node

    monkeypatch.setattr(graph.Emit, "__call__", nameless)
    with pytest.raises(AssertionError, match="stands for no captured node"):
        check_fates(explain("bert"))


def test_layers_stand_for_all_their_fellows():
    """What `deduplicate` calls from several places is a captured node of each of these layers."""
    found = explained("llama").graphs[0]
    inside = [node for node in found.after if node.name.startswith("repeated_layer/")]
    assert inside
    computing = [node for node in inside if node.target == "bicompile.mm_add.default"]
    calls = [node for node in found.after if node.target == "invoke_subgraph"]
    assert len(calls) > 1
    assert {len(node.origins) for node in computing} == {len(calls)}


BECAME = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("bicompile.qkv_proj.default", "replaced")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("bicompile.swiglu.default", "absorbed")),
    "lm_head": ("bicompile.mm.default", "replaced"),
}


def test_rows_of_a_llama():
    rows = explained("llama").rows
    assert {row.verdict for row in rows} == {Verdict.INVARIANT}
    products = [row for row in rows if row.target == "aten.mm.default"]
    assert len(products) == 3 * 7 + 1
    for row in products:
        name = row.module.rpartition(".")[2]
        assert (row.op, row.kind) == BECAME.get(name, ("bicompile.mm_add.default", "absorbed"))
        assert row.rule.startswith(("replace -> bicompile.mm.default", "fuse -> bicompile.qkv"))
        assert "never split" in row.order
        assert row.schedule in row.schedules
    gate = next(row for row in products if row.module == "model.layers.1.mlp.gate_proj")
    assert "modeling_llama.py:" in gate.line
    assert gate.holds == "float32[18, 64]" or "64]" in gate.holds
    assert gate.flop == 2 * 18 * 32 * 64
    assert gate.bytes == 4 * (18 * 32 + 32 * 64 + 18 * 64)
    squares = next(row for row in rows if row.target == "aten.pow.Tensor_Scalar")
    assert squares.kind == "absorbed"
    assert squares.rule == "computed by bicompile.rms_norm.default"
    attention = [row for row in rows if row.target == "bicompile.sdpa.default"]
    assert [row.rule for row in attention] == [
        "replace -> bicompile.sdpa.default: captured whole"
    ] * 3
    assert attention[0].flop == 2 * 2 * (2 * 4) * 9 * 9 * 8


def test_refusals_are_rows():
    explanation = explained("convolutional")
    refused = {row.target: row.rule for row in explanation.refused}
    assert set(refused) == {"aten._native_batch_norm_legit_functional.default"}
    assert (
        "statistics over the batch" in refused["aten._native_batch_norm_legit_functional.default"]
    )
    with pytest.raises(errors.BicompileError), torch.no_grad():
        torch.compile(convolutional(), backend="batch_invariant")(torch.randn(2, 3, 9, 9))


def test_every_kind_of_refusal_is_collected():
    def program(x):
        y = F.dropout(x, 0.5) + torch.linalg.svdvals(x).sum()
        return y.double() @ y.double().mT

    explanation = bicompile.explain(program, X)
    check_fates(explanation)
    refused = {row.target for row in explanation.refused}
    assert refused >= {"aten._linalg_svd.default", "aten.mm.default"}
    assert explanation.counts()["refused"] >= 3
    text = explanation.text()
    assert "draws random numbers" in text
    assert 'options={"unsupported": "allow"}' in " ".join(text.split())


def test_what_is_allowed_is_not_guaranteed():
    allowed = bicompile.explain(torch.linalg.svdvals, X, options={"unsupported": "allow"})
    verdicts = {row.target: row.verdict for row in allowed.rows}
    assert verdicts["aten._linalg_svd.default"] is Verdict.ALLOWED
    with pytest.raises(errors.UnknownOption):
        bicompile.explain(lambda x: x, X, options={"fuell": 1})


def test_gradients_are_deterministic_only():
    explanation = bicompile.explain(torch.nn.Linear(8, 8), X, training=True)
    assert [found.name for found in explanation.graphs] == ["forward", "backward"]
    assert explanation.counts()["deterministic only"] >= 2
    check_fates(explanation)


def test_nothing_runs(monkeypatch):
    """No kernel is built or launched, Inductor is not asked, the model keeps its weights."""

    def never(*_, **__):
        raise AssertionError("explain compiled or ran something")

    monkeypatch.setattr(native, "load", never)
    monkeypatch.setattr(inductor, "compile_inner", never)
    model = mlp()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    bicompile.explain(model, X)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_model_without_memory():
    with torch.device("meta"):
        huge = torch.nn.Linear(1 << 20, 1 << 20)  # 4 TB
        x = torch.empty(2, 1 << 20)
    explanation = bicompile.explain(huge, x)
    assert explanation.rows[-1].flop == 2 * 2 << 40
    assert huge.weight.device.type == "meta"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch can trace for a GPU")
def test_no_gpu_without_a_build_for_it():
    with pytest.raises(errors.UnsafeSetting, match="built without CUDA"):
        bicompile.explain(mlp(), X, device="cuda")


@needs_cuda_build
def test_a_gpu_that_is_not_there():
    explanation = bicompile.explain(mlp(), X, device="cuda")
    (product,) = [row for row in explanation.rows if row.op == "bicompile.addmm.default"]
    assert product.schedule.startswith("bm 4, bn 32, bk 32, warps 2, stages 5, tma False")
    assert len(product.schedules) == 5
    assert explanation.pins["gpu architecture"]
    assert "triton" in explanation.pins


def test_compiled_models_are_explained_as_what_they_were():
    plain = bicompile.explain(mlp(), X).counts()
    assert bicompile.explain(bicompile.compile(mlp()), X).counts() == plain
    assert bicompile.explain(torch.compile(mlp()), X).counts() == plain


def test_shapes_do_not_follow_earlier_calls():
    model = mlp()
    for rows in (4, 5, 6):
        found = bicompile.explain(model, torch.randn(rows, 8), dynamic=False)
        assert f"float32[{rows}, 8]" in {row.holds for row in found.rows}


def test_text_folds_layers():
    text = explained("llama").text(width=160)
    assert "model.layers.0-2 (3 equal layers)" in text
    assert text.count("self_attn.q_proj") == 1
    assert "modeling_llama.py:" in text
    assert "one chain over K in pinned steps" in text
    assert max(map(len, explained("llama").text(width=80).splitlines())) <= 80
    every = explained("llama").text(all=True, width=160)
    assert len(every.splitlines()) > 2 * len(text.splitlines())


def test_layers_that_differ_are_not_folded():
    model = llama()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    kwargs = PROGRAMS["llama"]()[2]
    text = bicompile.explain(model, **kwargs).text()
    assert "equal layers" not in text


def test_too_many_rows_for_a_terminal(monkeypatch):
    monkeypatch.setattr(explanation_text, "LIMIT", 20)
    with pytest.raises(errors.GraphTooLarge, match="--html FILE") as caught:
        explained("llama").text(all=True)
    assert "too many for a terminal" in str(caught.value)


def test_json_holds_every_row():
    explanation = explained("bert")
    document = json.loads(explanation.json())
    (found,) = document["graphs"]
    assert [node["name"] for node in found["nodes"]] == [row.name for row in explanation.rows]
    assert found["nodes"][0].keys() == explanation.rows[0].json().keys()
    assert document["counts"] == {"invariant": len(explanation.rows)}
    proofs = document["independence"]
    assert [p["verdict"] for p in proofs] == [p.verdict for p in explanation.independence] != []


def branches(x):
    if x.sum() > 0:
        return x + 1
    return x


def test_untraceable_program():
    with pytest.raises(errors.Untraceable) as caught:
        bicompile.explain(branches, X)
    text = str(caught.value)
    assert "cannot be captured as one graph: Detected data-dependent branching" in text
    assert "test_explain.py:" in text and "if x.sum() > 0:" in text


@pytest.mark.parametrize(
    ("args", "said"), [((torch.randn(4, 7),), "8"), ((), "rgument"), ((X, X), "rgument")]
)
def test_wrong_inputs(args, said):
    with pytest.raises(errors.WrongInputs, match=said) as caught:
        bicompile.explain(torch.nn.Linear(8, 8), *args)
    given = ", ".join(map(graph.describe, args))
    assert f"given: {given}" in str(caught.value)


def test_unsafe_setting_is_refused():
    model = llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(errors.UnsafeSetting):
        bicompile.explain(model, torch.zeros(1, 3, dtype=torch.long))


def test_the_cpu_thresholds_are_those_of_the_source():
    source = Path(schedules.matmul_table.__file__).with_name("cpu.cpp").read_text()
    few = schedules.FEW_COLUMN_ROWS
    assert f"kFewRows = {schedules.FEW_ROWS};" in source
    assert f"kFewColumnRows = P::kBlock == 32 ? {few[True]} : {few[False]};" in source
    assert "if (along_k && M < kFewRows) run_rows();" in source
    assert "else if (!along_k && M < kFewColumnRows) run_columns();" in source


def test_the_block_of_row_kernels_is_that_of_the_source():
    folder = Path(schedules.matmul_table.__file__).parent.parent
    assert f"\nBLOCK = {schedules.BLOCK} " in (folder / "common" / "trees.py").read_text()


@pytest.mark.parametrize(
    ("program", "rows", "chosen"),
    [
        (lambda x: x @ torch.ones(8, 8), 4, "columns"),
        (lambda x: x @ torch.ones(8, 8), 24, "panels"),
        (lambda x: F.linear(x, torch.ones(8, 8)), 63, "rows"),
        (lambda x: F.linear(x, torch.ones(8, 8)), 64, "panels"),
    ],
)
def test_cpu_schedules(program, rows, chosen):
    found = bicompile.explain(program, torch.randn(rows, 8))
    assert [row.schedule for row in found.rows if row.op == "bicompile.mm.default"] == [chosen]


@needs_cuda_build
def test_gpu_schedules_of_every_family():
    def program(q, x):
        attended = F.scaled_dot_product_attention(q, q, q)
        return attended, x.sum(0), x.softmax(-1), F.layer_norm(x, (8,)), x.norm(dim=-1)

    q = torch.randn(2, 4, 9, 16, dtype=torch.bfloat16)
    found = bicompile.explain(program, q, X, device="cuda", dynamic=False)
    chosen = {row.op: row.schedule for row in found.rows if row.op.startswith("bicompile.")}
    assert chosen == {
        "bicompile.sdpa.default": "rows 16, warps 4, stages 3, registers 0",
        "bicompile.sum.default": "rows 16, warps 1",
        "bicompile.softmax.default": "rows 16, warps 1",
        "bicompile.layer_norm.default": "rows 16, warps 1",
        "bicompile.norm.default": "rows 16, warps 1",
    }


@pytest.mark.parametrize(
    "name", [n for n, op in load_all().items() if op.family in ("reduce", "softmax", "norm")]
)
def test_gpu_schedules_of_rows(name):
    """Every op over rows says how many terms a row has, whatever the order of its arguments."""
    by_type = {"Tensor": torch.empty(4, 6, 8, device="meta"), "List[int]": [1, 2]}
    by_name = {"dim": 1, "normalized_ndim": 2, "groups": 2}
    args = {
        a.name: by_type.get(str(a.type), by_name.get(a.name))
        for a in getattr(torch.ops.bicompile, name).default._schema.arguments
    }
    terms = 24 if "groups" in args else 6 if args.get("dim") == 1 else 48
    assert schedules._reduced([4, 6, 8], args) == terms
    assert schedules._rows_cuda(load_all()[name].family, name, args).chosen


def test_input_names():
    seen = []

    def backend(gm, inputs):
        seen.extend(dry_capture.input_names(gm))
        return gm.forward

    torch.compile(mlp().forward, backend=backend)(X)
    assert set(seen) >= {"0.weight", "0.bias", "input args.0", "2.weight", "2.bias"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_are_proven_independent(name):
    proofs = explained(name).independence
    assert proofs
    assert {p.verdict for p in proofs} == {"proven"}


def test_joined_ops_are_followed():
    """And a mixer is named: the loss is over the batch."""

    q, k, v = (torch.randn(8, 8) for _ in range(3))

    def program(x):
        a, b, c = x @ q, x @ k, x @ v
        h = x + F.silu(a) * b
        return h + c @ q, (h * h).mean()

    found = bicompile.explain(program, torch.randn(5, 8))
    assert [p.verdict for p in found.independence] == ["proven", "mixes"]
    assert "mean" in found.independence[1].node
    assert json.loads(found.json())["independence"][1]["verdict"] == "mixes"
