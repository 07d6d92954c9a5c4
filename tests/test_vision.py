"""The promise on images and sound: a row has the same bits alone and among others.

Tiny random transformers models with convolutions; BatchNorm in eval mode.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from bicompile import testing

TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
    ),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(hidden_size=16, image_size=33, patch_size=11, **TINY)
    ),
    "mobilenet": lambda: transformers.MobileNetV2Model(
        transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=33)
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=16,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **TINY,
        )
    ),
}


def tiny(name, dtype):
    """The model with weights so large that rows differ in all bits, and rows for it."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    shape = (8, 400) if name == "wav2vec2" else (8, 3, 33, 33)
    return model.to(dtype), torch.randn(shape).to(dtype)


QUICK = [
    ("resnet", torch.float32),
    ("convnext", torch.bfloat16),
    ("vit", torch.bfloat16),
    ("wav2vec2", torch.float32),
]
CASES = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.soak)
    for name in MODELS
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rows(name, dtype):
    model, images = tiny(name, dtype)
    compiled = torch.compile(model, backend="batch_invariant")
    with torch.no_grad():
        alone = compiled(images[:1])[0]
        for count, place in ((2, 1), (5, 0), (8, 7)):
            rows = torch.full_like(images[:count], torch.nan)
            rows[place] = images[0]
            among = compiled(rows)[0][place : place + 1]
            testing.assert_same_bits(among, alone, f"{place} of {count}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maximum_of_windows(dtype):
    """Of equal elements the first is meant, and NaN is larger than every number."""
    images = torch.randn(5, 4, 19, 22).mul(2).round().to(dtype)
    images[1, 0, ::3, ::4] = torch.nan

    def pooled(t):
        return F.max_pool2d(t, 3, 2, 1, return_indices=True)

    torch._dynamo.reset()
    compiled = torch.compile(pooled, backend="batch_invariant")
    whole = compiled(images)
    eager = pooled(images.nan_to_num(9.0))
    assert torch.equal(whole[0].nan_to_num(9.0), eager[0])
    kept = [0, 2, 3, 4]
    assert torch.equal(whole[1][kept], eager[1][kept])
    for place in range(5):
        part = compiled(images[place : place + 1])
        testing.assert_same_bits(part, [t[place : place + 1] for t in whole], f"image {place}")
