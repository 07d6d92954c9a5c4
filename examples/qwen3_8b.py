"""A model of 8 billion parameters, without its memory: `bicompile explain examples.qwen3_8b:model`.

Run as a program, it explains the first layer.
"""

import torch
import transformers

import bicompile


def model(layers=36):
    """Qwen3-8B and what it is called with; `bicompile explain` makes it on the device "meta"."""
    config = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.zeros(2, 16, dtype=torch.long)
    return made, (), {"input_ids": ids, "use_cache": False}


if __name__ == "__main__":
    with torch.device("meta"):
        made, args, kwargs = model(layers=1)
    print(bicompile.explain(made, *args, **kwargs).text())
