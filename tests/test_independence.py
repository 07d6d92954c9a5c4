"""The proof that rows are independent: models that are, planted ones that are not, and each run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from perturbed import ROWS, Model, confirm, numbers
from rewriting import rewrite
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from bicompile.independence import MIXES, PROVEN, UNDECIDED, prove, prove_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CAUSAL = transformers.AutoModelForCausalLM


def tokens(length=9):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(3, 97, (ROWS, length), generator=rng)


def text(**more):
    mask = torch.ones(ROWS, 9, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": tokens(), "attention_mask": mask, **more}


def mixture():
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    config._experts_implementation = "grouped_mm"
    return CAUSAL.from_config(config), text(use_cache=False)


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(5), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": numbers(ROWS, 3, 16, 16)}


def causal(config):
    return CAUSAL.from_config(config), text(use_cache=False)


def classifier():
    """It reads the last token of each row, by the rows' numbers."""
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0, num_labels=3)
    return transformers.LlamaForSequenceClassification(config), text(use_cache=False)


GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": lambda: causal(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen3": lambda: causal(transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: causal(transformers.GPT2Config(**GPT2)),
    "bert": lambda: (transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), text()),
    "vit": vit,
    "t5": t5,
    "mixture of experts": mixture,
    "classifier": classifier,
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_proven(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    found = confirm(model.eval(), **inputs)
    assert {f.verdict for f in found} == {PROVEN}, found


# ----------------------------------------------------------------------------------- small models


def last_token(self, x, lengths):
    return x[torch.arange(x.shape[0]), lengths]


def write_cache(self, x, cache, positions):
    cache = cache.index_copy(2, positions, x)
    return cache, cache.sum(2)


def write_by_row(self, x, cache, positions):
    rows = torch.arange(x.shape[0])
    return torch.index_put(cache, (rows, positions), x)


def heads(self, x):
    b, s, e = x.shape
    q = x.view(b, s, 2, e // 2).transpose(1, 2).reshape(b * 2, s, e // 2)
    return torch.bmm(torch.softmax(torch.bmm(q, q.mT), -1), q).view(b, 2, s, e // 2)


def both_directions(self, x):
    """Twice the batch, as in guidance without a classifier."""
    y = torch.cat([x, -x]).tanh()
    return y[: x.shape[0]] + 2 * y[x.shape[0] :]


INDEPENDENT = {
    "instance norm": (Model(lambda m, x: m.f(x), f=nn.InstanceNorm1d(3)), [numbers(ROWS, 3, 8)]),
    "group norm": (nn.GroupNorm(2, 6), [numbers(ROWS, 6, 5)]),
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval(),
        [numbers(ROWS, 3, 8, 8)],
    ),
    "last token": (
        Model(last_token),
        [numbers(ROWS, 6, 5), torch.tensor([1, 0, 5, 2])],
    ),
    "cache": (Model(write_cache), [numbers(ROWS, 2, 1, 5), numbers(ROWS, 2, 7, 5), None]),
    "cache by row": (
        Model(write_by_row),
        [numbers(ROWS, 5), numbers(ROWS, 7, 5), torch.tensor([1, 0, 5, 2])],
    ),
    "heads in the batch axis": (Model(heads), [numbers(ROWS, 6, 8)]),
    "twice the batch": (Model(both_directions), [numbers(ROWS, 6)]),
    "einsum": (
        Model(lambda m, x, y: torch.einsum("bij,bkj->bik", x, y)),
        [numbers(ROWS, 3, 5), numbers(ROWS, 2, 5)],
    ),
    "repeated": (
        Model(lambda m, x: (x + 1, torch.ones(4, 3).tril().repeat(2, 1))),
        [numbers(ROWS, 6)],
    ),
    "row mean": (Model(lambda m, x: x - x.mean(1, keepdim=True)), [numbers(ROWS, 6)]),
    "sort in the row": (Model(lambda m, x: x.sort(-1).values.cumsum(-1)), [numbers(ROWS, 6)]),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_small_model_is_proven(name):
    model, args = INDEPENDENT[name]
    if name == "cache":
        table = torch.tensor([3])
        model, args = Model(lambda m, x, c: write_cache(m, x, c, m.at), at=None), args[:2]
        model.register_buffer("at", table) if not hasattr(model, "at") else setattr(
            model, "at", table
        )
    found = confirm(model, *args)
    assert {f.verdict for f in found} == {PROVEN}, found


def test_sequence_first():
    """The batch is axis 1, and beside the heads while attention runs."""
    layer = nn.TransformerEncoderLayer(16, 4, 32).eval()
    (found,) = confirm(layer, numbers(6, ROWS, 16), axis=1)
    assert (found.verdict, found.axis) == (PROVEN, 1)


# ----------------------------------------------------------------------------------------- planted


def capacity(self, x):
    """Tokens beyond an expert's capacity are dropped: who comes first is seen by the others."""
    expert = F.one_hot((x @ self.gate).argmax(-1), 3)
    place = (expert.cumsum(0) * expert).sum(-1)
    return torch.where((place <= 1)[:, None], x * 2, x)


def contrast(self, x):
    y = F.normalize(x, dim=-1)
    target = torch.arange(x.shape[0])
    return F.cross_entropy(y @ y.T, target)


PLANTED = {
    "batch norm in training": (
        Model(lambda m, x: m.norm(m.linear(x)), linear=nn.Linear(5, 6), norm=nn.BatchNorm1d(6)),
        "_native_batch_norm_legit_functional",
        "m.norm(m.linear(x))",
    ),
    "mean loss": (Model(lambda m, x: (x.tanh() - 1).square().mean()), "mean", ".mean()"),
    "batch mean": (Model(lambda m, x: x - x.mean(0)), "mean", "x.mean(0)"),
    "batch variance": (Model(lambda m, x: x / x.var(0)), "var", "x.var(0)"),
    "roll": (Model(lambda m, x: x + x.roll(1, 0)), "roll", "x.roll(1, 0)"),
    "flip": (Model(lambda m, x: x * x.flip(0)), "flip", "x.flip(0)"),
    "sort over the batch": (Model(lambda m, x: x.sort(0).values), "sort", "x.sort(0)"),
    "sort that is not undone": (
        Model(lambda m, x: x[x[:, 0].argsort()] * 2),
        "sort",
        "x[:, 0].argsort()",
    ),
    "put back in another order": (
        Model(lambda m, x: x[x[:, 0].argsort()][x[:, 1].argsort().argsort()]),
        "sort",
        "x[:, 1].argsort().argsort()",
    ),
    "attention across the batch": (
        Model(lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0]),
        "scaled_dot_product_attention",
        "F.scaled_dot_product_attention(x[None], x[None], x[None])",
    ),
    "cumsum over the batch": (Model(lambda m, x: x.cumsum(0)), "cumsum", "x.cumsum(0)"),
    "softmax over the batch": (Model(lambda m, x: x.softmax(0)), "softmax", "x.softmax(0)"),
    "maximum over the batch": (Model(lambda m, x: x - x.amax(0)), "amax", "x.amax(0)"),
    "every pair": (Model(lambda m, x: (x[:, None] - x[None]).abs()), "sub", "x[:, None] - x[None]"),
    "similarities": (Model(lambda m, x: x @ x.T), "mm", "x @ x.T"),
    "one row for all": (Model(lambda m, x: x + x[0]), "select", "x + x[0]"),
    "shifted rows": (Model(lambda m, x: torch.cat([x[1:], x[:1]])), "slice_1", "x[1:], x[:1]"),
    "other row by a table": (
        Model(lambda m, x: x + x[torch.tensor([0])]),
        "index",
        "x[torch.tensor([0])]",
    ),
    "view that cuts rows": (
        Model(lambda m, x: x * x.T.reshape(x.shape)),
        "_unsafe_view",
        "x.T.reshape(x.shape)",
    ),
    "convolution along the batch": (
        Model(lambda m, x: m.conv(x.T[None])[0].T, conv=nn.Conv1d(5, 5, 3, padding=1)),
        "conv1d",
        "m.conv(x.T[None])",
    ),
    "capacity of experts": (
        Model(capacity, gate=nn.Parameter(torch.eye(5, 3))),
        "cumsum",
        "expert.cumsum(0)",
    ),
    "normalised over all": (
        Model(lambda m, x: F.group_norm(x.T[None], 1)[0].T),
        "group_norm",
        "F.group_norm(x.T[None], 1)",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_model_mixes_rows(name):
    model, node, line = PLANTED[name]
    found = confirm(model, numbers(ROWS, 5))
    mixed = [f for f in found if f.verdict == MIXES]
    assert mixed, found
    for f in mixed:
        assert f.node.startswith(node), f
        assert line in f.line, f


def test_contrastive_loss():
    """Both meet: similarities of all pairs come first."""
    (found,) = confirm(Model(contrast), numbers(ROWS, 5))
    assert (found.verdict, found.node) == (MIXES, "mm")


# ------------------------------------------------------------------------------------------ graphs


def layers(x, cache, at, weights):
    """Four equal layers that write a cache: our passes make calls of one subgraph of them."""
    caches = []
    for weight in weights:
        h = F.layer_norm(x, x.shape[-1:])
        kept = cache.index_copy(1, at, h)
        caches.append(kept)
        x = x + F.gelu(F.scaled_dot_product_attention(h, kept, kept) @ weight)
    return x, *caches


def graph_of(function, *args):
    for x in args[:2]:
        torch._dynamo.mark_dynamic(x, 0)
    return rewrite(function, *args)[0]


def trace_of(function, *args):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        context = StatelessSymbolicContext([DimDynamic.DUCK, *[DimDynamic.STATIC] * 3])
        fakes = [mode.from_tensor(x, symbolic_context=context) for x in args]
        return make_fx(function, tracing_mode="symbolic")(*fakes)


def test_graph_after_our_passes():
    weights = [numbers(8, 8) for _ in range(4)]
    args = numbers(ROWS, 1, 8), numbers(ROWS, 6, 8), torch.tensor([3]), weights
    gm = graph_of(layers, *args)
    targets = {str(n.target) for n in gm.graph.nodes}
    assert "invoke_subgraph" in targets
    assert "bicompile.sdpa.default" in targets
    found = prove(gm)
    assert len(found) == 5
    assert {(f.verdict, f.axis) for f in found} == {(PROVEN, 0)}, found


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("form,verdict", [("rows", PROVEN), ("queries", MIXES)])
def test_what_a_mask_shows(form, verdict, gradient):
    """Its ranges are counted over the rows of a mask: those must not be rows of the batch."""

    def attention(q, bias):
        ours = torch.ops.bicompile
        if form == "queries":
            q, bias = q.permute(1, 2, 0, 3), bias.permute(1, 2, 0, 3)
        visible = ours.visible_range(bias)
        if gradient:
            return ours.sdpa_backward_visible(q, q, q, q, bias, visible, 0.3)[0]
        return ours.sdpa_visible(q, q, q, bias, visible, 0.3)

    found = prove(trace_of(attention, numbers(ROWS, 1, 6, 8), numbers(ROWS, 1, 6, 6)))
    assert {f.verdict for f in found} == {verdict}, found


def test_line_inside_a_repeated_layer():
    def repeated(x, y, weights):
        for weight in weights:
            x = F.gelu(F.layer_norm(x, x.shape[-1:]) @ weight) - x.amax(0)
            x = x * y + 1
        return x

    args = numbers(ROWS, 8), numbers(ROWS, 8), [numbers(8, 8) for _ in range(4)]
    (found,) = prove(graph_of(repeated, *args))
    assert found.verdict == MIXES
    assert found.node.startswith("amax")
    assert "x.amax(0)" in found.line


def test_fixed_batch_is_undecided():
    gm = rewrite(lambda x: x * 2, numbers(ROWS, 8))[0]
    (found,) = prove(gm)
    assert (found.verdict, found.node) == (UNDECIDED, None)


def test_write_in_place_is_undecided():
    """Only a graph without writes can be followed: what was read before is not known any more."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x, y: (x.add_(y), y), tracing_mode="symbolic"
    )(numbers(5, 3), numbers(5, 3))
    assert {f.verdict for f in prove(graph)} == {UNDECIDED}


def test_every_rule_is_of_an_op():
    """A name that no op has would never be asked for."""
    from bicompile.independence.rules import TABLE
    from bicompile.passes.audit import ALLOWED
    from bicompile.registry import load_all

    load_all()
    shared = ALLOWED["pointwise"][1] | ALLOWED["conversion"][1]
    for name in TABLE:
        namespace, op = name.split("::")
        known = namespace == "transformers" or hasattr(getattr(torch.ops, namespace), op)
        assert known or op in shared, name


# --------------------------------------------------------------------------------------- undecided


UNKNOWN = {
    "an op without a rule": (lambda m, x: x.new_tensor(1) * torch.linalg.det(x.mT @ x), "det"),
    "the batch size": (lambda m, x: x / x.shape[0], "the batch size"),
    "a place that is the batch size": (
        lambda m, x: x * torch.arange(9).narrow(0, x.shape[0], 5),
        "the batch size",
    ),
    "the row's number": (lambda m, x: x + torch.arange(x.shape[0])[:, None], "row's number"),
    "numbers along the batch": (
        lambda m, x: x + torch.arange(2 * x.shape[0]).view(2, -1)[1][:, None],
        "place in the batch",
    ),
    "a triangle of rows": (lambda m, x: x * torch.ones_like(x).tril(), "place in the batch"),
    "a part of the batch": (lambda m, x: x[: x.shape[0] // 2], "part of the batch"),
    "random numbers": (lambda m, x: F.dropout(x), "dropout"),
    "a count of rows": (lambda m, x: x * torch.ones_like(x).sum(0), "size depends on the batch"),
    "uninitialised memory": (lambda m, x: x + torch.empty_like(x), "before it is written"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_undecided(name):
    function, reason = UNKNOWN[name]
    (found,) = prove_model(Model(function), numbers(ROWS, 5))
    assert found.verdict == UNDECIDED
    assert reason in found.reason
