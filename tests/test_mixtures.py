"""Mixtures of experts: a token's bits do not depend on who else chose its experts.

Tiny random models as users have them by default (`experts_implementation="grouped_mm"`).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from rewriting import count, rewrite, x
from subject import (
    Subject,
    check_batches,
    check_caches,
    check_padding,
    check_prefix,
    check_threads,
    check_token_by_token,
)
from test_models import DEVICES, can_grow

from bicompile import native, registry, testing

KERNELS = registry.load_all()
ours = torch.ops.bicompile


@pytest.fixture(scope="module", autouse=True)
def _native():
    native.load()


LENGTH = 45
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, head_dim=12, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**GROUPED, num_experts=8, num_experts_per_tok=3),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=12,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED,
        head_dim=12,
        num_local_experts=8,
        num_experts_per_tok=3,
        layer_types=["full_attention"],
        rope_scaling=None,
    ),
}
EAGER_ATTENTION = ("gpt_oss",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = [("mixtral", "bfloat16")]


def cases(quick):
    """Every model in every dtype; those not in `quick` only in the long run (`-m soak`)."""
    return [
        pytest.param(n, d, id=f"{n}-{d}", marks=[] if (n, d) in quick else pytest.mark.soak)
        for n in CONFIGS
        for d in DTYPES
    ]


each_device = pytest.mark.parametrize("device", DEVICES)


def tiny(name, dtype, experts=None, device="cpu"):
    """The random model; weights so large that experts differ much, few bits so that scores tie."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if experts is not None:
        config._experts_implementation = experts
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device)


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases(QUICK))
def test_tokens_do_not_depend_on_each_other(name, dtype, device):
    subject = Subject(tiny(name, DTYPES[dtype], device=device), LENGTH)
    check_batches(subject, (2, 8))
    if name not in EAGER_ATTENTION:  # its products with masked keys take part in the sums
        check_padding(subject)


@each_device
@pytest.mark.parametrize(("name", "dtype"), cases([]))
def test_chunks_and_caches(name, dtype, device):
    subject = Subject(tiny(name, DTYPES[dtype], device=device), LENGTH)
    check_token_by_token(subject)
    if can_grow(device):
        check_prefix(subject)


@pytest.mark.soak
@pytest.mark.parametrize("name", CONFIGS)
def test_every_cache_and_many_threads(name):
    subject = Subject(tiny(name, torch.bfloat16), LENGTH)
    check_threads(subject)
    check_batches(subject)
    if can_grow("cpu"):
        check_caches(subject)


@each_device
def test_every_implementation_has_the_same_bits(device):
    grouped, batched = (
        Subject(tiny("mixtral", torch.bfloat16, name, device), LENGTH)
        for name in ("grouped_mm", "batched_mm")
    )
    testing.assert_same_bits(batched.reference, grouped.reference, "batched_mm and grouped_mm")


def library_experts(a, w, offs, tf32):
    """What transformers runs on a CPU: a product of the library for each expert."""
    out = a.new_zeros(len(a), w.shape[2])
    begin = 0
    for matrix, end in zip(w, offs.tolist(), strict=True):
        out[begin:end] = a[begin:end] @ matrix
        begin = end
    return out


def longer_runs_are_split_over_k(a, w, offs, tf32):
    out = a.new_zeros(len(a), w.shape[2])
    begin = 0
    for matrix, end in zip(w, offs.tolist(), strict=True):
        half = a.shape[1] // 2 if end - begin > 4 else 0
        rows = a[begin:end]
        out[begin:end] = ours.mm(rows[:, :half], matrix[:half], False) + ours.mm(
            rows[:, half:], matrix[half:], False
        )
        begin = end
    return out


@pytest.mark.parametrize("variant", [library_experts, longer_runs_are_split_over_k])
def test_planted_variants_are_caught(variant):
    sizes = {"M": 40, "K": 301, "N": 33, "G": 3}
    case = KERNELS["grouped_mm"].contract.cases[0]
    sample = testing.make_sample(KERNELS["grouped_mm"], case, torch.float32, sizes)
    with pytest.raises(testing.InvarianceViolation):
        for seed in range(5):
            testing.rows_do_not_depend_on_the_batch(variant, sample, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_a_row_has_the_bits_of_mm_with_its_matrix(dtype, integer):
    a, w = x(70, 129, dtype=dtype), x(4, 40, 129, dtype=dtype).mT
    offs = torch.tensor([1, 1, 60, 67], dtype=integer)
    out = ours.grouped_mm(a, w, offs, False)
    for g, (begin, end) in enumerate([(0, 1), (1, 1), (1, 60), (60, 67)]):
        rows = ours.mm(a[begin:end], w[g].contiguous(), False)
        testing.assert_same_bits(out[begin:end], rows, f"run {g}")
    assert not out[67:].any()


def test_runs_of_columns():
    """The matrices on the left; the product of the transposed ones."""
    a, b = x(3, 20, 16, dtype=torch.bfloat16), x(16, 32, dtype=torch.bfloat16)
    offs = torch.tensor([8, 24, 32], dtype=torch.int32)
    gm, _, result, expected = rewrite(lambda a, b, o: F.grouped_mm(a, b, offs=o), a, b, offs)
    assert count(gm, ours.grouped_mm.default) == 1
    torch.testing.assert_close(result, expected)
    gm, _, result, _ = rewrite(lambda a, b: F.grouped_mm(a, b), a, a.mT)
    testing.assert_same_bits(result, ours.bmm(a, a.mT, False), "without runs it is a bmm")
