"""Models of text: decoders, mixtures of experts, state spaces, encoders, encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bicompile.coverage.zoo.entry import Entry, Inputs, from_config

ZOO: dict[str, Entry] = {}
LENGTH = 20
WORDS = 97

BASE = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 12}


def _words(model: Any, batch: int) -> Inputs:
    return {"inputs_embeds": torch.randn(batch, LENGTH, _width(model)).to(model.dtype)}


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[-1])


def _text(
    kind: str,
    auto: str,
    laws: tuple[str, ...],
    models: Mapping[str, tuple[str, Mapping[str, Any]]],
    without: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    for name, (config, settings) in models.items():
        ZOO[name] = Entry(
            kind,
            from_config(auto, config, settings),
            _words,
            laws=laws,
            without=(without or {}).get(name, {}),
        )


_text(
    "text decoder",
    "AutoModelForCausalLM",
    ("padding", "cache"),
    {
        "Llama": ("LlamaConfig", GROUPED),
        "Qwen2": ("Qwen2Config", GROUPED),
        "Qwen3": ("Qwen3Config", WIDE),
        "Mistral": ("MistralConfig", {**WIDE, "sliding_window": None}),
        "Mistral, sliding window": ("MistralConfig", {**WIDE, "sliding_window": 8}),
        "Gemma": ("GemmaConfig", WIDE),
        "Gemma 2": ("Gemma2Config", {**WIDE, "sliding_window": 8, "num_hidden_layers": 2}),
        "Gemma 3": ("Gemma3TextConfig", {**WIDE, "sliding_window": 8}),
        "Phi": ("PhiConfig", GROUPED),
        "Phi-3": ("Phi3Config", GROUPED),
        "SmolLM3": ("SmolLM3Config", GROUPED),
        "OLMo 2": ("Olmo2Config", GROUPED),
        "Cohere": ("CohereConfig", GROUPED),
        "GLM-4": ("Glm4Config", WIDE),
        "Granite": ("GraniteConfig", GROUPED),
        "StableLM": ("StableLmConfig", {**GROUPED, "partial_rotary_factor": 0.5}),
        "StarCoder2": ("Starcoder2Config", GROUPED),
        "GPT-2": (
            "GPT2Config",
            {"vocab_size": WORDS, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 128},
        ),
        "GPT-J": (
            "GPTJConfig",
            {
                "vocab_size": WORDS,
                "n_embd": 48,
                "n_layer": 1,
                "n_head": 4,
                "n_positions": 128,
                "rotary_dim": 8,
            },
        ),
        "GPT-NeoX": ("GPTNeoXConfig", BASE),
        "OPT": (
            "OPTConfig",
            {
                "vocab_size": WORDS,
                "hidden_size": 48,
                "word_embed_proj_dim": 48,
                "ffn_dim": 40,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 128,
            },
        ),
        "Falcon, alibi": (
            "FalconConfig",
            {
                "vocab_size": WORDS,
                "hidden_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "alibi": True,
            },
        ),
        "BLOOM": (
            "BloomConfig",
            {"vocab_size": WORDS, "hidden_size": 48, "n_layer": 1, "n_head": 4},
        ),
    },
)

_text(
    "mixture of experts",
    "AutoModelForCausalLM",
    ("padding", "cache"),
    {
        "Mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 8}),
        "Qwen3-MoE": (
            "Qwen3MoeConfig",
            {**WIDE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        ),
        "Qwen2-MoE": (
            "Qwen2MoeConfig",
            {
                **GROUPED,
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 24,
            },
        ),
        "OLMoE": ("OlmoeConfig", {**GROUPED, "num_experts": 8, "num_experts_per_tok": 3}),
        "DeepSeek-V3": (
            "DeepseekV3Config",
            {
                **BASE,
                "num_key_value_heads": 4,
                "n_routed_experts": 8,
                "n_group": 4,
                "topk_group": 2,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 24,
                "first_k_dense_replace": 0,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 12,
                "v_head_dim": 12,
            },
        ),
        "gpt-oss": (
            "GptOssConfig",
            {
                **WIDE,
                "num_local_experts": 8,
                "num_experts_per_tok": 3,
                "sliding_window": 8,
                "rope_scaling": None,
            },
        ),
        "Llama 4": (
            "Llama4TextConfig",
            {
                **WIDE,
                "num_local_experts": 4,
                "intermediate_size_mlp": 40,
                "attention_chunk_size": 8,
            },
        ),
        "Granite-MoE": (
            "GraniteMoeConfig",
            {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 3},
        ),
    },
)

_text(
    "state space",
    "AutoModelForCausalLM",
    (),
    {
        "Mamba": (
            "MambaConfig",
            {"vocab_size": WORDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1},
        ),
        "Falcon-Mamba": (
            "FalconMambaConfig",
            {"vocab_size": WORDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1},
        ),
        "Mamba-2": (
            "Mamba2Config",
            {
                "vocab_size": WORDS,
                "hidden_size": 32,
                "state_size": 8,
                "num_hidden_layers": 1,
                "num_heads": 4,
                "head_dim": 16,
                "n_groups": 2,
                "chunk_size": 8,
            },
        ),
        "RWKV": (
            "RwkvConfig",
            {
                "vocab_size": WORDS,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "attention_hidden_size": 32,
                "intermediate_size": 40,
                "context_length": 64,
            },
        ),
        "RecurrentGemma": (
            "RecurrentGemmaConfig",
            {**BASE, "num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 8},
        ),
        "Qwen3-Next": (
            "Qwen3NextConfig",
            {
                **WIDE,
                "num_hidden_layers": 2,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 24,
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 12,
                "linear_value_head_dim": 12,
                "layer_types": ["linear_attention", "full_attention"],
            },
        ),
    },
)

_text(
    "text encoder",
    "AutoModelForMaskedLM",
    ("padding",),
    {
        "BERT": ("BertConfig", BASE),
        "RoBERTa": ("RobertaConfig", BASE),
        "ALBERT": ("AlbertConfig", {**BASE, "embedding_size": 24}),
        "ELECTRA": ("ElectraConfig", {**BASE, "embedding_size": 24}),
        "MPNet": ("MPNetConfig", BASE),
        "DeBERTa-v2": (
            "DebertaV2Config",
            {
                **BASE,
                "relative_attention": True,
                "position_buckets": 16,
                "pos_att_type": ["p2c", "c2p"],
            },
        ),
        "ModernBERT": (
            "ModernBertConfig",
            {**BASE, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        ),
        "DistilBERT": (
            "DistilBertConfig",
            {
                "vocab_size": WORDS,
                "dim": 48,
                "hidden_dim": 40,
                "n_layers": 1,
                "n_heads": 4,
                "max_position_embeddings": 128,
            },
        ),
    },
)

_FNET = from_config("AutoModelForMaskedLM", "FNetConfig", BASE)
ZOO["FNet"] = Entry("text encoder", _FNET, _words, dtype=torch.float32)


def _pairs(model: Any, batch: int) -> Inputs:
    """Words of two texts."""
    first = _words(model, batch)["inputs_embeds"]
    return {"inputs_embeds": first, "decoder_inputs_embeds": _words(model, batch)["inputs_embeds"]}


_TWO = {
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": WORDS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 1,
    "num_heads": 4,
    "vocab_size": WORDS,
    "decoder_start_token_id": 0,
}
for _name, _config, _settings in (
    ("T5", "T5Config", _T5),
    ("mT5", "MT5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    ("BART", "BartConfig", _TWO),
    ("Marian", "MarianConfig", _TWO),
    ("M2M-100", "M2M100Config", _TWO),
):
    ZOO[_name] = Entry(
        "encoder-decoder",
        from_config("AutoModelForSeq2SeqLM", _config, _settings),
        _pairs,
    )
