"""The bisector: planted causes are named, at their layer, element and step."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from tiny_model import make_tiny_model
from torch import nn

import bicompile
from bicompile import bisect_command, bisector, cli, models
from bicompile.errors import UnsafeSetting

F = nn.functional
LAYERS, ROWS, LENGTH, WIDTH = 12, 3, 6, 16
PLANTED_LAYER = 7


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(h.transpose(1, 2).reshape(b, s, -1))
        return x + self.down_proj(F.gelu(self.up_proj(x))) * 0.7


class Decoder(nn.Module):
    def __init__(self, layers=LAYERS):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril().bool())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.mask)
        return x


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return Decoder().eval()


KEPT = {}
trace_once = bisector._Graphs._trace


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch):
    """Tests of one model share its graph."""

    def trace(self, args, kwargs):
        key = (id(self.model), str([x.shape for x in (*args, *kwargs.values())]))
        if key not in KEPT:
            KEPT[key] = self.model, trace_once(self, args, kwargs)
        return KEPT[key][1]

    monkeypatch.setattr(bisector._Graphs, "_trace", trace)


def planted(target, variant, module=None, planted_at=None, when=lambda: True):
    """A program that runs the graph by eager PyTorch with one op of a layer replaced."""

    def program(gm):
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        if when():
            node = place(graph, target, module)
            if planted_at is not None:
                planted_at.append(node.name)
            node.target = variant
        return torch.fx.GraphModule(gm, graph)

    return program


def place(graph, target, module):
    """The first node of an op in a module."""
    path = f"layers.{PLANTED_LAYER}" if module is None else module
    for node in graph.nodes:
        paths = [p for p, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if target in str(node.target) and (paths[-1:] or [""])[0].endswith(path):
            return node
    raise AssertionError(f"no {target} in {path}")


def split_k(x, w, b=None):
    half = x.shape[-1] // 2
    return F.linear(x[..., :half], w[:, :half], b) + F.linear(x[..., half:], w[:, half:])


def wide(x, w, b=None):
    return F.linear(x.double(), w.double(), b.double()).float()


def bias_first(x, w, b=None):
    terms = torch.cat([b.expand(*x.shape[:-1], 1, len(b)), (x[..., None, :] * w).mT], -2)
    return terms.cumsum(-2)[..., -1, :]


def half_precision(x, w, b=None):
    return F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float()


def mask_off_by_one(q, k, v, mask, *args, **kwargs):
    return F.scaled_dot_product_attention(q, k, v, mask | mask.roll(1, -1), **kwargs)


def mask_as_a_number(q, k, v, mask, *args, **kwargs):
    added = torch.zeros(mask.shape).masked_fill(~mask, -8.0)
    return F.scaled_dot_product_attention(q, k, v, added, **kwargs)


def scaled_twice(q, k, v, mask, *args, **kwargs):
    scale = math.sqrt(q.shape[-1] ** -0.5)
    weight = torch.softmax(((q * scale) @ (k * scale).mT).masked_fill(~mask, -math.inf), -1)
    return laid_out(weight @ v)


def laid_out(x):
    """As eager attention leaves it in memory, so that the view behind it is one."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def reversed_keys(q, k, v, mask, *args, **kwargs):
    score = (q @ k.mT) * q.shape[-1] ** -0.5
    weight = score.masked_fill(~mask, -math.inf).softmax(-1)
    return laid_out((weight[..., None] * v[..., None, :, :]).flip(-2).cumsum(-2)[..., -1, :])


def norm_in_one_pass(x, shape, weight, bias, eps=1e-5, *args):
    var = (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()
    return (x - x.mean(-1, keepdim=True)) * (var + eps).rsqrt() * weight + bias


def other_eps(x, shape, weight, bias, *args):
    return F.layer_norm(x, shape, weight, bias, 1.1e-5)


def neighbour(x, y):
    return x + y.roll(1, 0)


CAUSES = {
    "a split of the sum": ("linear", split_k, f"layers.{PLANTED_LAYER}.down_proj"),
    "a wider accumulator": ("linear", wide, f"layers.{PLANTED_LAYER}.qkv"),
    "another start of the sum": ("linear", bias_first, f"layers.{PLANTED_LAYER}.out"),
    "lower precision": ("linear", half_precision, f"layers.{PLANTED_LAYER}.up_proj"),
    "a mask off by one": ("scaled_dot_product", mask_off_by_one, None),
    "a mask as a number": ("scaled_dot_product", mask_as_a_number, None),
    "a scale in two parts": ("scaled_dot_product", scaled_twice, None),
    "keys in another order": ("scaled_dot_product", reversed_keys, None),
    "variance in one pass": ("layer_norm", norm_in_one_pass, f"layers.{PLANTED_LAYER}.norm"),
    "another epsilon": ("layer_norm", other_eps, f"layers.{PLANTED_LAYER}.norm"),
    "an approximate function": ("gelu", lambda x, **_: F.gelu(x, approximate="tanh"), None),
    "another rounding": ("mul", lambda x, y: (x.double() * y).bfloat16().float(), None),
    "truncation": ("mul", lambda x, y: ((x * y).view(torch.int32) & ~1).view(torch.float32), None),
    "one wrong element": ("gelu", lambda x, **_: wrong_element(F.gelu(x)), None),
    "a neighbour's row": ("add", neighbour, None),
    "a fused multiply and add": (
        "add",
        lambda x, y: (x.double() + y.double() * (1 + 2**-24)).float(),
        None,
    ),
}


def wrong_element(x):
    x = x.clone()
    x.view(torch.int32)[1, 4, 9] += 4096
    return x


@pytest.mark.parametrize("name", CAUSES)
def test_planted_cause_is_named(decoder, name):
    places = []
    found = bicompile.bisect(
        decoder,
        [numbers(ROWS, LENGTH, WIDTH)],
        row=1,
        other_program=planted(*CAUSES[name], planted_at=places),
    )
    assert found.node == places[0]
    assert found.module.startswith(f"layers.{PLANTED_LAYER}")
    assert found.faithful == (True, True)
    assert "test_bisector.py" in found.line
    if name == "one wrong element":
        assert found.index == (4, 9)
        assert found.ulps == 4096
        assert found.count == (1, LENGTH * 2 * WIDTH)


def test_no_difference(decoder):
    x = numbers(ROWS, LENGTH, WIDTH)
    assert bicompile.bisect(decoder, [x], row=1) is None
    # Row 1 is wrong, row 0 is not.
    program = planted(*CAUSES["one wrong element"])
    assert bicompile.bisect(decoder, [x], row=0, other_program=program) is None
    assert bicompile.bisect(decoder, [x], row=1, other_program=program) is not None


def test_rows_of_other_batches(decoder):
    """A row at another place in a batch of another size; the planted node is folded heads."""
    x = numbers(5, LENGTH, WIDTH)
    run = {"program": nothing, "other_program": planted("scaled_dot_product", scaled_twice)}
    found = bicompile.bisect(decoder, [x[3:4]], [x], row=0, other_row=3, **run)
    # A batch of another size may differ earlier by itself: that is what the bisector is for.
    early = bicompile.bisect(decoder, [x[3:4]], [x], row=0, other_row=3, program=nothing)
    assert found is not None
    if early is None:
        assert "scaled_dot_product" in found.node
    else:
        assert found.node == early.node


def nothing(gm):
    return gm


class Step(nn.Module):
    """One step of decoding with a cache [B, T, E]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, cache, at):
        cache = cache.index_copy(1, at, x)
        visible = torch.arange(cache.shape[1]) <= at
        y = F.scaled_dot_product_attention(x, cache, cache, visible)
        for layer in self.layers:
            y = layer(y).tanh()
        return y, cache


def test_loop_over_steps():
    """The cause is in one step alone; what is written to the cache is compared too."""
    torch.manual_seed(0)
    model, calls = Step(), []

    def in_step_103():
        calls.append(1)
        return len(calls) > 103

    def advance(inputs, results):
        return results[0], results[1], inputs[2] + 1

    found = bicompile.bisect(
        model,
        (numbers(2, 1, WIDTH), torch.zeros(2, 120, WIDTH), torch.tensor([0])),
        row=1,
        batch={0: 0, 1: 0},
        other_program=planted("linear", split_k, "layers.1", when=in_step_103),
        steps=110,
        advance=advance,
    )
    assert (found.step, found.module) == (103, "layers.1")
    assert str(found).startswith("first difference: step 103, layers.1, linear_1")


@pytest.mark.soak
def test_padding():
    """A row alone, and behind padding that its mask hides."""
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

        def forward(self, x, mask):
            return self.layers[0](x, mask[:, None, None, :])

    x = numbers(2, 9, WIDTH)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    alone = [x[:, 3:], mask[:, 3:]]
    same = bicompile.bisect(Masked(), alone, [x, mask], program="bicompile")
    assert same is None
    wrong = mask.clone()
    wrong[:, 2] = True
    found = bicompile.bisect(Masked(), alone, [x, wrong], program="bicompile")
    assert "scaled_dot_product" in found.node


@pytest.mark.parametrize("program", ["inductor", "bicompile"])
def test_compiled_programs(program):
    """Against eager PyTorch, compiled code differs somewhere; batches differ only by default."""
    torch.manual_seed(0)
    model = Decoder(layers=1).eval()
    x = numbers(4, LENGTH, WIDTH)
    found = bicompile.bisect(model, [x], row=2, program="eager", other_program=program)
    assert found is None or found.module.startswith("layers.0")
    if program == "bicompile":
        assert found is not None
        assert found.faithful == (True, True)
        assert bicompile.bisect(model, [x[2:3]], [x], row=0, other_row=2, program=program) is None


def test_rounds_name_the_same_node(decoder, monkeypatch):
    """If watching all nodes changes bits, few are watched at a time."""
    monkeypatch.setattr(bisector.Side, "faithful", lambda self, results: len(results) < 0)
    found = bicompile.bisect(
        decoder,
        [numbers(ROWS, LENGTH, WIDTH)],
        row=1,
        other_program=planted("linear", split_k, f"layers.{PLANTED_LAYER}.down_proj"),
    )
    assert found.module == f"layers.{PLANTED_LAYER}.down_proj"
    assert found.faithful == (False, False)
    assert "watching changed the bits" in str(found)


def test_wrong_arguments(decoder):
    x = [numbers(ROWS, LENGTH, WIDTH)]
    for wrong in ({"row": 3}, {"program": "tvm"}, {"padding": "middle"}):
        with pytest.raises(UnsafeSetting):
            bicompile.bisect(decoder, x, **{"row": 0, **wrong})


def test_rows_that_mix():
    """The place of a row is known there too: the node at which rows meet is what is looked for."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Softmax(0), nn.Linear(5, 2))
    x = numbers(ROWS, 4)
    other = x.clone()
    other[0] += 1
    found = bicompile.bisect(model, [x], [other], row=2)
    assert (found.module, found.target) == ("1", "aten.softmax.int")


def test_numbers_of_rows_are_no_difference():
    """A row stands at another place: what only says where it stands is not compared."""

    def last(self, x):
        return x[torch.arange(x.shape[0]), -1].exp()

    class Last(nn.Module):
        forward = last

    x = numbers(ROWS, LENGTH, WIDTH)
    program = planted("exp", lambda x: x.exp() * 1.5, "")
    found = bicompile.bisect(Last(), [x[2:]], [x], other_row=2, other_program=program)
    assert found.target == "aten.exp.default"


def test_command(tmp_path, capsys, monkeypatch):
    command = ["bisect", "--model", str(make_tiny_model(tmp_path)), "--program", "eager"]
    assert cli.main([*command, "--batch-sizes", "2,2"]) == 0
    assert "no bit differs" in capsys.readouterr().out
    monkeypatch.setattr(bisector.Side, "row", property(lambda self: 0, lambda *_: None), False)
    assert cli.main([*command, "--batch-sizes", "2,3"]) == 1  # other rows are compared: ids differ
    assert "first difference: step 0, model.model.embed_tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--batch-sizes", "3"])


def test_docs_show_real_output(capsys):
    page = (Path(__file__).parent.parent / "docs" / "bisect.md").read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (_, program), (_, shown) = fenced[:2]
    exec(program, {"__name__": "shown"})
    assert capsys.readouterr().out == shown


@pytest.mark.real
def test_real_model():
    """One token alone and among others: the worked example of docs/bisect.md."""
    model, tokenizer = models.load(dtype=torch.float32)
    model = bisect_command.logits_of(model)
    ids = tokenizer("Tell", return_tensors="pt").input_ids
    size = model.model.config.vocab_size
    inputs = [bisect_command._inputs(bisect_command._batch(ids, n, size), 0) for n in (1, 5)]
    rows = {"row": 0, "other_row": 4}
    found = bicompile.bisect(model, *inputs, program="inductor", **rows)
    assert "layers.0" in found.module
    assert found.faithful == (True, True)
    assert bicompile.bisect(model, *inputs, program="bicompile", **rows) is None
