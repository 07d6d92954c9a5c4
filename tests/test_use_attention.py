"""`use_attention`: windows, caps, sinks and biases keep a row's bits; tiny random models.

What the Triton kernels make of the same masks is in `test_triton_windows.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from attention_rows import VARIANTS, Rows, check

import bicompile
from bicompile import api, attention_interface, errors, native
from bicompile.testing import InvarianceViolation, assert_batch_invariant, assert_same_bits

WINDOW = 8
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ONE = {
    **SIZES, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
    "num_hidden_layers": 1, "layer_types": ["full_attention"],
}  # fmt: skip
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}),
    "Mistral": lambda: transformers.MistralConfig(
        **{**WIDE, "num_hidden_layers": 1}, sliding_window=WINDOW
    ),
    "Qwen2": lambda: transformers.Qwen2Config(**GROUPED, use_sliding_window=True, **MIXED),
    "Gemma 2": lambda: transformers.Gemma2Config(
        **WIDE, **MIXED, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "Gemma 2 of one layer": lambda: transformers.Gemma2Config(
        **ONE, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gpt-oss of one layer": lambda: transformers.GptOssConfig(
        **ONE, num_local_experts=4, num_experts_per_tok=2
    ),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**WIDE, **MIXED, query_pre_attn_scalar=16),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **WIDE, **MIXED, num_local_experts=4, num_experts_per_tok=2
    ),
    "T5": lambda: transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
MODELS = [name for name in CONFIGS if "one layer" not in name]
LAWS = ("batch size", "position", "padding", "chunks", "decode", "cache", "prefix")


def tiny(name, dtype=torch.float32, attention=None):
    """A random model; weights so large that rows differ in all bits."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if attention:
        config._attn_implementation = attention
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def ours(name, dtype=torch.float32):
    return bicompile.use_attention(tiny(name, dtype))


def tokens(batch, length):
    return {"input_ids": torch.randint(3, 97, (batch, length))}


def pairs(batch, length):
    return {**tokens(batch, 11), "decoder_input_ids": torch.randint(3, 97, (batch, length))}


def inputs_of(name):
    return pairs if name == "T5" else tokens


def logits(model, name, batch=2, length=45):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        return model(**inputs_of(name)(batch, length), use_cache=False).logits


@pytest.fixture(scope="module", autouse=True)
def _known():
    native.load()
    attention_interface.register()


# ------------------------------------------------------------------------------ attention alone

LENGTH = 5 * WINDOW + 5
CHUNKS = ([LENGTH], [30, 10, 5], [20] + [1] * 25, [3, 9, 1, 1, 17, 8, 6], [1] * LENGTH)
PADS = ((1, "left"), (5, "left"), (33, "left"), (7, "right"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_keeps_its_bits(name, dtype):
    check(Rows(VARIANTS[name], LENGTH, dtype, WINDOW), CHUNKS, PADS)


def cap_follows_the_keys(q, k, v, mask, causal, scale, cap, sinks):
    return SDPA(q, k, v, mask, causal, scale, cap * (1 + k.shape[2] * 2**-20), sinks)


def sinks_follow_the_queries(q, k, v, mask, causal, scale, cap, sinks):
    sinks = None if sinks is None else sinks * (1 + q.shape[2] * 2**-20)
    return SDPA(q, k, v, mask, causal, scale, cap, sinks)


def a_window_is_what_the_cache_holds(q, k, v, mask, causal, scale, cap, sinks):
    return SDPA(q, k, v, None if q.shape[2] == 1 else mask, causal, scale, cap, sinks)


SDPA = attention_interface._SDPA


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("window, cap", cap_follows_the_keys),
        ("window, sinks", sinks_follow_the_queries),
        ("window", a_window_is_what_the_cache_holds),
    ],
)
def test_planted_attention_is_caught(name, planted, monkeypatch):
    monkeypatch.setattr(attention_interface, "_SDPA", planted)
    with pytest.raises(InvarianceViolation):
        check(Rows(VARIANTS[name], LENGTH, torch.float32, WINDOW), CHUNKS, PADS)


def _check_numbers(monkeypatch):
    """Each key of the row that a numbered mask lets through is the token of that number."""
    rows, seen = Rows(VARIANTS["window"], LENGTH, torch.float32, WINDOW), 0

    def look(q, k, v, mask, *rest):
        nonlocal seen
        if mask is not None and mask.dtype is torch.int32:
            numbers = mask[-1 if len(q) == 1 else 1, 0]
            for number, at in {(int(n), i) for line in numbers for i, n in enumerate(line) if n}:
                assert torch.equal(k[len(k) // 2, :, at], rows.qkv[1][1, :, number - 1])
                seen += 1
        return SDPA(q, k, v, mask, *rest)

    monkeypatch.setattr(attention_interface, "_SDPA", look)
    check(rows, CHUNKS, PADS[:2])
    assert seen > 1000


def test_masks_number_the_keys_of_a_row(monkeypatch):
    _check_numbers(monkeypatch)


def test_numbers_from_the_start_of_a_cache_are_caught(monkeypatch):
    def planted(**kwargs):
        seen = attention_interface.mask(**kwargs)
        return seen.clamp(max=WINDOW) if seen.dtype is torch.int32 else seen

    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, attention_interface.NAME, planted)
    with pytest.raises(AssertionError):
        _check_numbers(monkeypatch)


# -------------------------------------------------------------------------------------- accuracy


def _errors(name):
    """Of our attention and of the model's own, against the model's own in float64."""
    own = tiny(name, attention="eager")
    exact = copy.deepcopy(own)
    if name == "gpt-oss":
        exact.set_experts_implementation("eager")
    exact = logits(exact.double(), name)
    found = logits(ours(name), name), logits(own, name)
    return [float((x.double() - exact).abs().max() / exact.abs().max()) for x in found]


@pytest.mark.parametrize("name", MODELS)
def test_as_accurate_as_the_models_own(name):
    error, of_eager = _errors(name)
    assert error <= 1.5 * of_eager + 1e-7


@pytest.mark.parametrize(
    ("name", "ignored"), [("Gemma 2", "softcap"), ("gpt-oss", "s_aux"), ("T5", "position_bias")]
)
def test_what_is_ignored_is_caught(name, ignored, monkeypatch):
    whole = attention_interface.attention

    def planted(*args, **kwargs):
        assert kwargs.pop(ignored) is not None
        return whole(*args, **kwargs)

    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(attention_interface, "attention", planted)
    try:
        error, of_eager = _errors(name)
    finally:
        functions.register(attention_interface.NAME, whole)
    assert error > 100 * of_eager


# ---------------------------------------------------------------------------------- whole models


def search(model, name, law):
    assert_batch_invariant(
        model, inputs_of(name), properties=[law], max_examples=5, max_batch_size=5,
        max_length=6 * WINDOW,
    )  # fmt: skip


each_law = pytest.mark.parametrize("law", LAWS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.soak
@each_law
@each_dtype
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_the_bits_of_a_row(name, dtype, law):
    search(ours(name, dtype), name, law)


@pytest.mark.soak
@each_law
@each_dtype
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Gemma 3", "T5"])
def test_on_a_cpu_sdpa_needs_nothing(name, dtype, law):
    search(tiny(name, dtype, "sdpa"), name, law)


@pytest.mark.soak
def test_an_encoder_decoder_may_be_padded():
    """One example of the search above: source and target, each among others."""
    example = {
        "property": "padding", "batch": 2, "seed": 0, "length": 21, "row": 1, "side": "left",
        "padding": 5, "padding of the source": 3,
    }  # fmt: skip
    assert_batch_invariant(ours("T5"), pairs, example=example)


EAGER = [
    ("Gemma 2 of one layer", 7),
    pytest.param("gpt-oss of one layer", 16, marks=pytest.mark.soak),
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("name", "seed"), EAGER)
def test_eager_attention_needs_it(name, seed, own):
    """It adds up what is padded in another order: seen in bfloat16."""
    model = tiny(name, torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    example = {
        "property": "padding", "batch": 1, "seed": seed, "length": 200, "row": 0, "side": "left",
        "padding": 5,
    }  # fmt: skip
    if own:
        with pytest.raises(InvarianceViolation, match="5 tokens of padding on the left"):
            assert_batch_invariant(model, tokens, example=example)
    else:
        assert_batch_invariant(bicompile.use_attention(model), tokens, example=example)


def test_without_windows_it_is_sdpa():
    sdpa = logits(bicompile.compile(tiny("Llama", attention="sdpa")), "Llama")
    torch._dynamo.reset()
    assert_same_bits(logits(bicompile.compile(ours("Llama")), "Llama"), sdpa, "our attention")


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "gpt-oss", "T5"])
def test_models_generate(name):
    model = ours(name)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ids = tokens(2, 20)["input_ids"]
    found = [
        model.generate(
            ids, max_new_tokens=2 * WINDOW, do_sample=False, eos_token_id=None,
            cache_implementation=cache, disable_compile=True,
        )
        for cache in ("dynamic", "static")
    ]  # fmt: skip
    assert torch.equal(*found)


def test_the_page_speaks_of_the_models_that_are_tested():
    page = (Path(__file__).parent.parent / "docs" / "attention.md").read_text()
    table = page.split("|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [name for name, *_ in lines] == MODELS
    for name, attention, *_ in lines:
        assert f'"{tiny(name).config._attn_implementation}"' in attention
        windows = "sliding_attention" in (getattr(CONFIGS[name](), "layer_types", None) or [])
        assert ("windows" in attention) == (windows or name == "Mistral")


@pytest.mark.parametrize("name", MODELS)
def test_who_needs_it_is_told(name):
    def told(model):
        return api._wants_our_attention(model.config, {"cuda"})

    assert (told(tiny(name)) is None) == (name == "Llama")
    assert told(ours(name)) is None


def test_eager_attention_is_warned_of():
    api._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"attention of Gemma2ForCausalLM.*use_attention\(model\)"):
        bicompile.compile(tiny("Gemma 2"))


# ------------------------------------------------------------------------------- what is refused


def test_dropout_of_weights_is_a_random_op():
    model = ours("Mistral").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    compiled = torch.compile(model, backend="batch_invariant")
    with pytest.raises(errors.RandomOp):
        compiled(**tokens(2, 12), use_cache=False)


@pytest.mark.parametrize(
    ("name", "what"), [("Gemma 2", "a cap of attention scores"), ("gpt-oss", "attention sinks")]
)
def test_gradients_that_do_not_exist_are_refused(name, what):
    with pytest.raises(errors.UnsupportedGradient, match=what):
        ours(name)(**tokens(2, 12), use_cache=False).logits.sum().backward()


def test_windows_have_gradients():
    models = ours("Mistral"), tiny("Mistral", attention="eager")
    for model in models:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model(**tokens(2, 20), use_cache=False).logits.square().mean().backward()
    found, wanted = (model.model.layers[0].self_attn.k_proj.weight.grad for model in models)
    torch.testing.assert_close(found, wanted)
