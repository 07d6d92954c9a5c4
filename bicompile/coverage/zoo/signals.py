"""Models of images and sound, and of text beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bicompile.coverage.zoo.entry import Entry, Inputs, from_config

ZOO: dict[str, Entry] = {}
PIXELS = 32
WORDS = 97


def _images(model: Any, batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, PIXELS, PIXELS).to(model.dtype)}


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_PATCHES = {**_SMALL, "image_size": PIXELS, "patch_size": 8}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}

for _name, _maker, _config, _settings in (
    ("ViT", "ViTForImageClassification", "ViTConfig", _PATCHES),
    ("DeiT", "DeiTForImageClassification", "DeiTConfig", _PATCHES),
    ("BEiT", "BeitForImageClassification", "BeitConfig", _PATCHES),
    ("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", _PATCHES),
    (
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": PIXELS,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    ("ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig", {**_STAGES, "num_stages": 2}),
    (
        "ConvNeXt V2",
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {**_STAGES, "num_stages": 2},
    ),
    ("ResNet", "ResNetForImageClassification", "ResNetConfig", {**_STAGES, "embedding_size": 16}),
    (
        "RegNet",
        "RegNetForImageClassification",
        "RegNetConfig",
        {**_STAGES, "embedding_size": 16, "groups_width": 8},
    ),
    (
        "EfficientNet",
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "image_size": PIXELS,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.1,
            "hidden_dim": 320,
        },
    ),
    (
        "MobileNetV2",
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"image_size": PIXELS, "depth_multiplier": 0.25},
    ),
    (
        "PoolFormer",
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    ),
    (
        "SegFormer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
    ),
):
    ZOO[_name] = Entry("vision", from_config(_maker, _config, _settings), _images)


def _sound(model: Any, batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, 640).to(model.dtype)}


_WAVES = {
    **_SMALL,
    "vocab_size": WORDS,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
for _name, _maker, _config in (
    ("wav2vec 2.0", "Wav2Vec2ForCTC", "Wav2Vec2Config"),
    ("HuBERT", "HubertForCTC", "HubertConfig"),
    ("WavLM", "WavLMForCTC", "WavLMConfig"),
):
    ZOO[_name] = Entry("speech", from_config(_maker, _config, _WAVES), _sound)


def _spectrum(model: Any, batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, 32, 16).to(model.dtype)}


ZOO["AST"] = Entry(
    "speech",
    from_config(
        "ASTForAudioClassification",
        "ASTConfig",
        {
            **_SMALL,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
        },
    ),
    _spectrum,
)


def _listen(model: Any, batch: int) -> Inputs:
    ids = torch.randint(3, WORDS, (batch, 7))
    return {"input_features": torch.randn(batch, 16, 40).to(model.dtype), "decoder_input_ids": ids}


_WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": WORDS,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
ZOO["Whisper"] = Entry(
    "speech", from_config("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER), _listen
)


def _captions(model: Any, batch: int) -> Inputs:
    return {**_images(model, batch), "input_ids": torch.randint(3, WORDS, (batch, 12))}


_CAPTION = {**_SMALL, "vocab_size": WORDS, "max_position_embeddings": 64, "projection_dim": 32}
_SEEN = {**_PATCHES, "projection_dim": 32}


def _beside(name: str, maker: str, config: str, text: Mapping[str, Any]) -> None:
    settings = {"text_config": text, "vision_config": _SEEN, "projection_dim": 32}
    made = from_config(maker, config, settings)
    ZOO[name] = Entry("multimodal", made, _captions, outputs=("image_embeds", "text_embeds"))


_beside("CLIP", "CLIPModel", "CLIPConfig", {**_CAPTION, "eos_token_id": 2})
_beside("SigLIP", "SiglipModel", "SiglipConfig", _CAPTION)
_beside("Chinese-CLIP", "ChineseCLIPModel", "ChineseCLIPConfig", _CAPTION)

_IMAGE_WORD = WORDS - 1


def _look(model: Any, batch: int) -> Inputs:
    ids = torch.randint(3, _IMAGE_WORD, (batch, 24))
    ids[:, 2:18] = _IMAGE_WORD
    return {**_images(model, batch), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


ZOO["LLaVA"] = Entry(
    "multimodal",
    from_config(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {**_SEEN, "model_type": "clip_vision_model", "num_hidden_layers": 2},
            "text_config": {
                **_SMALL,
                "model_type": "llama",
                "vocab_size": WORDS,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "image_token_index": _IMAGE_WORD,
        },
    ),
    _look,
)
