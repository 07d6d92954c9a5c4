"""A model of transformers, which is not ours: plain PyTorch fails, bicompile holds."""

import torch
import transformers

from bicompile.testing import InvarianceViolation, assert_batch_invariant

torch.manual_seed(0)
config = transformers.GPTNeoXConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
)
model = transformers.GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def make_inputs(batch_size, length):
    return {"input_ids": torch.randint(3, 97, (batch_size, length))}


search = {"max_batch_size": 3, "max_length": 9, "max_examples": 3}
for name in ("batch size", "padding"):
    try:
        assert_batch_invariant(model, make_inputs, backend="eager", properties=[name], **search)
    except InvarianceViolation as violation:
        print(violation)
        assert_batch_invariant(model, make_inputs, example=violation.example)
    assert_batch_invariant(model, make_inputs, properties=[name], **search)
    print(f"{name} under batch_invariant: none found")
