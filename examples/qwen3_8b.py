"""A model of 8 billion parameters for `bicompile explain examples.qwen3_8b:model`."""

import torch
import transformers


def model():
    """Qwen3-8B with random weights; under `bicompile explain` it takes no memory."""
    config = transformers.Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.zeros(2, 16, dtype=torch.long)
    return made, (), {"input_ids": ids, "use_cache": False}
