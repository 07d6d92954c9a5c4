"""Small models of several families, explained once for all tests."""

from __future__ import annotations

import functools

import torch
import torch.nn as nn

import bicompile

IDS = torch.zeros(2, 9, dtype=torch.long)


def llama(layers=3, **changes):
    import transformers

    sizes = {
        "vocab_size": 98,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()


def gpt2():
    import transformers

    config = transformers.GPT2Config(vocab_size=98, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=98, num_attention_heads=4, **sizes)
    return transformers.BertModel(config).eval()


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


PROGRAMS = {
    "llama": lambda: (llama(), (), {"input_ids": IDS, "use_cache": False}),
    "gpt2": lambda: (gpt2(), (), {"input_ids": IDS, "use_cache": False}),
    "bert": lambda: (bert(), (), {"input_ids": IDS}),
    "convolutional": lambda: (convolutional(), (torch.randn(2, 3, 9, 9),), {}),
}


def explain(name, **options):
    model, args, kwargs = PROGRAMS[name]()
    return bicompile.explain(model, *args, **kwargs, **options)


@functools.cache
def explained(name):
    return explain(name)


def mlp(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.LayerNorm(width))
