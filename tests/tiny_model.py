"""A tiny random Llama with a tokenizer and a chat template, for tests without network."""

from __future__ import annotations

from pathlib import Path

import torch


def make_tiny_model(folder: Path) -> Path:
    """Write the model and return its folder."""
    import tokenizers
    import transformers

    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
