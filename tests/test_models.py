"""The promise on whole models: one row's logits have the same bits however they are computed.

Tiny random transformers models; `examples/` and `bicompile demo` do the same on a real one.
The reference of every comparison is the row alone, in one piece, without a cache or padding.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import bicompile
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


class Subject:
    """A compiled model and one row of embeddings to be followed through it."""

    def __init__(self, name, dtype, device, attention="sdpa", **kwargs):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        config._attn_implementation = attention
        decoder = name in DECODERS
        auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
        model = auto.from_config(config).to(device, dtype).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.config, self.dtype, self.device = config, dtype, device
        self.model = bicompile.compile(model, **kwargs)
        self.row = self.random(1, LENGTH)
        self.reference = self(self.row)

    def random(self, batch, length):
        x = torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(batch))
        return x.to(self.device, self.dtype)

    def __call__(self, x, mask=None, cache=None, start=0):
        """Logits of `x` [B, S, E], which follows `start` tokens that the cache holds."""
        b, s, _ = x.shape
        if mask is None:
            mask = torch.ones(b, start + s, dtype=torch.long, device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -s:].contiguous()
        kwargs = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        if cache is None and self.config.model_type != "bert":
            kwargs["use_cache"] = False
        with torch.no_grad():
            output = self.model(
                inputs_embeds=x.contiguous(),
                attention_mask=mask,
                position_ids=positions,
                **kwargs,
            )
        return output.logits

    def pieces(self, x, chunks, cache):
        """Logits of `x`, computed chunk by chunk into `cache`."""
        out, start = [], 0
        for size in chunks:
            out.append(self(x[:, start : start + size], cache=cache, start=start))
            start += size
        return torch.cat(out, 1)

    def expect(self, logits, what):
        testing.assert_same_bits(logits, self.reference, what)


def check_batches(subject, batches=(2, 3, 5, 8, 17, 32)):
    for batch in batches:
        x = subject.random(batch, LENGTH)
        at = (batch * 7) % batch if batch < 5 else batch - 2
        for bad in (None, float("nan"), float("inf"), 3e4):
            if bad is not None:
                x = torch.full_like(x, bad)
            x[at] = subject.row[0]
            subject.expect(subject(x)[at : at + 1], f"row {at} of {batch}, neighbours {bad}")
            if bad is None and batch > 5:
                break
    check_few_rows(subject)


def check_few_rows(subject, batches=(2, 3, 5)):
    """Two tokens only: so few rows that libraries switch to other kernels."""
    alone = subject(subject.row[:, :2])
    for batch in batches:
        x = subject.random(batch, 2)
        x[-1] = subject.row[0, :2]
        testing.assert_same_bits(subject(x)[-1:], alone, f"two tokens, row {batch - 1} of {batch}")


def check_padding(subject):
    for batch, pad in ((1, 1), (1, 7), (1, 33), (3, 7)):
        junk = subject.random(batch, LENGTH + pad)
        for side in ("left", "right"):
            x, mask = junk.clone(), torch.ones(batch, LENGTH + pad, dtype=torch.long)
            real = slice(pad, None) if side == "left" else slice(0, LENGTH)
            mask[-1, : pad if side == "left" else None] = 0
            mask[-1, real] = 1
            x[-1, real] = subject.row[0]
            logits = subject(x, mask.to(subject.device))
            subject.expect(logits[-1:, real], f"{side} padding of {pad} in a batch of {batch}")


def check_caches(subject):
    growing = DynamicCache(config=subject.config)
    subject.expect(subject.pieces(subject.row, [LENGTH], growing), "growing cache")
    for chunks in ([30, 10, 5], [20] + [1] * (LENGTH - 20)):
        growing = DynamicCache(config=subject.config)
        subject.expect(subject.pieces(subject.row, chunks, growing), f"growing cache {chunks}")
    for slots in (128, 512, 1024):
        for chunks in ([LENGTH], [30, 10, 5], [40] + [1] * (LENGTH - 40)):
            static = StaticCache(config=subject.config, max_cache_len=slots)
            subject.expect(subject.pieces(subject.row, chunks, static), f"{slots} slots {chunks}")


def check_token_by_token(subject):
    growing = DynamicCache(config=subject.config)
    subject.expect(subject.pieces(subject.row, [1] * LENGTH, growing), "token by token")


def check_prefix(subject):
    """A prefix that another request computed, in another batch and other chunks."""
    x = subject.random(3, LENGTH)
    x[1] = subject.row[0]
    prefix = DynamicCache(config=subject.config)
    subject.pieces(x[:, :25], [10, 15], prefix)
    prefix.batch_select_indices(torch.tensor([1], device=subject.device))
    rest = subject(subject.row[:, 25:], cache=prefix, start=25)
    testing.assert_same_bits(rest, subject.reference[:, 25:], "reused prefix")


def cases(names, quick):
    """Every model in every dtype; those not in `quick` only in the long run (`-m soak`)."""
    return [
        pytest.param(n, d, id=f"{n}-{d}", marks=[] if (n, d) in quick else pytest.mark.soak)
        for n in names
        for d in DTYPES
    ]


QUICK = [(name, "bfloat16") for name in CONFIGS] + [("llama", "float32"), ("gpt2", "float16")]


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases(CONFIGS, QUICK))
def test_batch_and_padding(name, dtype, device):
    subject = Subject(name, DTYPES[dtype], device)
    check_batches(subject)
    check_padding(subject)


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases(DECODERS, [("llama", "bfloat16")]))
def test_caches_chunks_and_prefixes(name, dtype, device):
    subject = Subject(name, DTYPES[dtype], device)
    check_caches(subject)
    check_token_by_token(subject)
    check_prefix(subject)


@each_device
def test_eager_attention(device):
    """bmm, softmax, bmm: all but padding, which shifts the order of their sums."""
    subject = Subject("llama", torch.bfloat16, device, attention="eager")
    check_batches(subject, (2, 5, 8))


@each_device
@pytest.mark.parametrize("dynamic", [True, False])
def test_static_and_dynamic_graphs_agree(dynamic, device):
    automatic = Subject("llama", torch.bfloat16, device)
    other = Subject("llama", torch.bfloat16, device, dynamic=dynamic)
    testing.assert_same_bits(other.reference, automatic.reference, f"dynamic={dynamic}")
    check_batches(other, (2, 3))


def test_threads():
    subject = Subject("llama", torch.bfloat16, "cpu")
    x = subject.random(8, LENGTH)
    x[5] = subject.row[0]
    for threads in (1, 2):
        with testing.num_threads(threads):
            subject.expect(subject(x)[5:6], f"{threads} threads")
            subject.expect(subject(subject.row), f"{threads} threads, alone")


def test_default_backend_is_caught():
    """The checks of this file can fail: PyTorch's own attention and matmuls do not pass them."""
    torch.manual_seed(0)
    subject = Subject.__new__(Subject)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 2
    subject.config, subject.dtype, subject.device = config, torch.float32, "cpu"
    subject.model = transformers.AutoModelForCausalLM.from_config(config).eval()
    subject.row = subject.random(1, LENGTH)
    subject.reference = subject(subject.row)
    for check in (check_batches, check_padding, check_caches, check_prefix):
        with pytest.raises(testing.InvarianceViolation):
            check(subject)
