"""The promise on whole models: one row's logits have the same bits however they are computed.

Tiny random transformers models; `test_real.py` does the same with a real one.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from subject import (
    Subject,
    check_batches,
    check_caches,
    check_padding,
    check_prefix,
    check_threads,
    check_token_by_token,
)

from bicompile import testing

LENGTH = 45
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=2048
    ),
    "bert": lambda: transformers.BertConfig(**SIZES),
}
DECODERS = ("llama", "qwen3", "gpt2")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_device = pytest.mark.parametrize("device", DEVICES)


def tiny(name, layers=1, dtype=torch.float32, attention="sdpa"):
    """The random model itself, not compiled; weights so large that rows differ in all bits."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    config._attn_implementation = attention
    decoder = name in DECODERS
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    model = auto.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def can_grow(device):
    """Whether a chunk can be added to a growing cache."""
    return device != "cpu" or Version(torch.__version__) >= Version("2.12")


def compiled(name, dtype, device, attention="sdpa", **kwargs):
    return Subject(tiny(name, 1, dtype, attention).to(device), LENGTH, **kwargs)


def cases(names, quick):
    """Every model in every dtype; those not in `quick` only in the long run (`-m soak`)."""
    return [
        pytest.param(n, d, id=f"{n}-{d}", marks=[] if (n, d) in quick else pytest.mark.soak)
        for n in names
        for d in DTYPES
    ]


QUICK = [(name, "bfloat16") for name in ("llama", "qwen3", "bert")]
QUICK += [("llama", "float32"), ("gpt2", "float16")]


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases(CONFIGS, QUICK))
def test_batch_and_padding(name, dtype, device):
    subject = compiled(name, DTYPES[dtype], device)
    check_batches(subject)
    check_padding(subject)


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases(DECODERS, [("llama", "bfloat16")]))
def test_caches_chunks_and_prefixes(name, dtype, device):
    if not can_grow(device):
        pytest.skip("no backend of PyTorch 2.11 compiles the mask of a chunk into a growing cache")
    subject = compiled(name, DTYPES[dtype], device)
    check_caches(subject)
    check_token_by_token(subject)
    check_prefix(subject)


@each_device
def test_eager_attention(device):
    """bmm, softmax, bmm: all but padding, which may shift the order of their sums."""
    subject = compiled("llama", torch.bfloat16, device, attention="eager")
    check_batches(subject, (2, 5))


@each_device
@pytest.mark.soak
def test_caches_of_eager_attention(device):
    if not can_grow(device):
        pytest.skip("no backend of PyTorch 2.11 compiles the mask of a chunk into a growing cache")
    subject = compiled("llama", torch.bfloat16, device, attention="eager")
    check_caches(subject)
    check_prefix(subject)


@each_device
@pytest.mark.parametrize("dynamic", [True, False])
def test_static_and_dynamic_graphs_agree(dynamic, device):
    automatic = compiled("llama", torch.bfloat16, device)
    other = compiled("llama", torch.bfloat16, device, dynamic=dynamic)
    testing.assert_same_bits(other.reference, automatic.reference, f"dynamic={dynamic}")
    check_batches(other, (2, 3))


def test_threads():
    subject = compiled("llama", torch.bfloat16, "cpu")
    check_threads(subject)


def test_default_backend_is_caught():
    """The checks of this file can fail: PyTorch's own attention and matmuls do not pass them."""
    subject = Subject(tiny("llama", layers=2), LENGTH, compile=lambda model: model)
    for check in (check_batches, check_padding, check_caches, check_prefix):
        with pytest.raises(testing.InvarianceViolation):
            check(subject)
