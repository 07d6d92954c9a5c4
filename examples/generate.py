# %% [markdown]
"""Text generation with transformers: the logits of a request, alone and among others.

The model is small and random, so that the example runs in seconds; with
`AutoModelForCausalLM.from_pretrained(...)` in its place nothing else changes.
"""

# %%
import torch
import transformers

import bicompile

PROMPT = [5, 17, 23, 42, 7]
OTHERS = ([3, 9], [8, 8, 31, 4, 90, 61, 12], [77])


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, as a tokenizer with padding_side="left" gives them."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def logits(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Logits of all new tokens, [rows, tokens, vocabulary]."""
    ids, mask = left_padded(rows)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.stack(output.logits, dim=1)


# %% One line makes the model batch-invariant; `generate` uses the compiled forward.
def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model = bicompile.compile(model)
    alone = logits(model, [PROMPT])[0]
    among = logits(model, [*OTHERS, PROMPT])[-1]
    print(f"{(alone != among).sum()} of {alone.numel()} logits differ")
    assert torch.equal(alone, among)


if __name__ == "__main__":
    main()
