"""FlexAttention: the known functions of scores and indices become our attention, others do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bicompile import errors
from bicompile.testing import InvarianceViolation, assert_batch_invariant, assert_same_bits

BATCH, HEADS, GROUPS, LENGTH, SIZE, BLOCK = 2, 4, 2, 43, 16, 16
RNG = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(BATCH, n, LENGTH, SIZE, generator=RNG) for n in (HEADS, GROUPS, GROUPS))
SLOPES = torch.rand(HEADS, generator=RNG)
TABLE = torch.randn(HEADS, 2 * LENGTH, generator=RNG)
OFFSET = torch.tensor(0.125, dtype=torch.float64)
DOCUMENT = torch.arange(LENGTH) // 10
PADDING = torch.tensor([0, 7])


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return (i >= j) & (i - j < 9)


def document(b, h, i, j):
    return (DOCUMENT[i] == DOCUMENT[j]) & (i >= j)


def padded(b, h, i, j):
    return (j >= PADDING[b]) & (i >= j)


def cap(score, b, h, i, j):
    return 3.0 * torch.tanh(score / 3.0)


def alibi(score, b, h, i, j):
    return score + SLOPES[h] * (j - i)


def table_under_a_cap(score, b, h, i, j):
    return OFFSET + cap(score, b, h, i, j) - TABLE[h, j - i + LENGTH]


def causal_score(score, b, h, i, j):
    return torch.where(j > i, -float("inf"), score)


def block_mask(mask_mod, batch=None):
    return create_block_mask(mask_mod, batch, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)


MASKS = {
    "none": None,
    "causal": block_mask(causal),
    "window": block_mask(window),
    "document": block_mask(document),
    "padded": block_mask(padded, BATCH),
    "blocks alone": BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 1, 2], [1, 0, 2], [1, 2, 0]]]], dtype=torch.int32),
        BLOCK_SIZE=BLOCK,
        seq_lengths=(LENGTH, LENGTH),
    ),
}
SCORES = {
    "itself": None,
    "cap": cap,
    "alibi": alibi,
    "table under a cap": table_under_a_cap,
    "causal": causal_score,
}


def run(function, *args, **kwargs):
    with torch.no_grad():
        return torch.compile(function, backend="batch_invariant", fullgraph=True, **kwargs)(*args)


def attend(mask, score):
    def attended(q, k, v):
        return flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)

    return attended


def seen(name):
    """A mask as a tensor."""
    if name == "none":
        return torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask = MASKS[name]
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    if name == "blocks alone":
        return mask.to_dense()[0, 0].bool()[i // BLOCK, j // BLOCK]
    b = torch.arange(BATCH)[:, None, None, None] if name == "padded" else 0
    return mask.mask_mod(b, 0, i, j)


def exact(name, score):
    """Attention in float64, and where a row sees something."""
    q, k, v = (t.double() for t in (Q, K, V))
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    scores = q @ k.mT * SIZE**-0.5
    h = torch.arange(HEADS)[:, None, None]
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    if score is not None:
        scores = score(scores, 0, h, i, j)
    scores = scores.masked_fill(~seen(name), -float("inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("name", MASKS)
def test_values(name):
    scores = [None, table_under_a_cap] if MASKS[name] else list(SCORES.values())

    def attended(q, k, v):
        return [attend(MASKS[name], score)(q, k, v) for score in scores]

    for got, score in zip(run(attended, Q, K, V), scores, strict=True):
        torch.testing.assert_close(got.double(), exact(name, score), rtol=2e-6, atol=2e-6)


def test_it_is_scaled_dot_product_attention():
    """The same bits, whichever op says it."""

    def both(q, k, v):
        bias = (SLOPES[:, None, None] * distance).masked_fill(~seen("window"), -float("inf"))
        return (
            attend(MASKS["causal"], None)(q, k, v),
            attend(None, causal_score)(q, k, v),
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            attend(MASKS["window"], alibi)(q, k, v),
            F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True),
        )

    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    one, other, sdpa, windowed, biased = run(both, Q, K, V)
    assert_same_bits([one, other], [sdpa, sdpa], "flex_attention")
    assert_same_bits(windowed, biased, "flex_attention with a bias")


def test_bfloat16():
    q, k, v = (t.bfloat16() for t in (Q, K, V))
    got = run(attend(MASKS["window"], alibi), q, k, v)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), exact("window", alibi), rtol=3e-2, atol=3e-2)


def masked_rows(mask_mod):
    """Attention whose rows have padding on the left, as a function of their lengths."""

    def attended(q, k, v, padding):
        def mask(b, h, i, j):
            return mask_mod(b, h, i, j) & (j >= padding[b])

        made = create_block_mask(mask, len(q), None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, score_mod=alibi, block_mask=made, enable_gqa=True)

    return attended


def test_padding_changes_no_bit():
    attended = torch.compile(masked_rows(window), backend="batch_invariant", fullgraph=True)
    with torch.no_grad():
        alone = attended(Q[1:, :, 7:], K[1:, :, 7:], V[1:, :, 7:], PADDING[:1])
        batch = attended(Q, K, V, PADDING)
    assert_same_bits(batch[1:, :, 7:], alone, "padded")


def qkv(batch):
    shapes = [(batch, heads, LENGTH, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return dict(zip("qkv", map(torch.randn, shapes), strict=True))


def test_rows_are_invariant():
    assert_batch_invariant(
        attend(MASKS["document"], table_under_a_cap), qkv, max_examples=4, max_batch_size=5,
        properties=["batch size", "position", "neighbours"],
    )  # fmt: skip


def test_a_score_that_follows_the_batch_is_caught():
    def planted(score, b, h, i, j):
        return score + (b * j) * 2**-10

    with pytest.raises(InvarianceViolation):
        assert_batch_invariant(
            attend(None, planted), qkv, properties=["position"], max_batch_size=5
        )


def squared(score, b, h, i, j):
    return score * score


def lowest_where_hidden(score, b, h, i, j):
    return torch.where(i >= j, score, -1e9)


def cap_of_a_sum(score, b, h, i, j):
    return 3.0 * torch.tanh((score + j) / 3.0)


def other_cap(score, b, h, i, j):
    return 2.0 * torch.tanh(score / 3.0)


def of_the_score(score, b, h, i, j):
    return score + torch.relu(score)


@pytest.mark.parametrize(
    "score", [squared, lowest_where_hidden, cap_of_a_sum, other_cap, of_the_score]
)
def test_other_functions_of_the_score_are_refused(score):
    with pytest.raises(errors.UnsupportedOp) as caught:
        run(attend(None, score), Q, K, V)
    assert "flex_attention cannot be made batch-invariant: the score is known" in str(caught.value)
    assert "test_flex_attention.py" in str(caught.value)
    assert "in attended: return flex_attention(" in str(caught.value)


HIDDEN = torch.rand(BATCH, LENGTH, generator=RNG) < 0.3


def row_by_row(b, h, i, j):
    return HIDDEN[b][j]


def of_a_whole_row(b, h, i, j):
    return (HIDDEN[b, j] & (i >= j)).any()


@pytest.mark.parametrize("mask_mod", [row_by_row, of_a_whole_row])
def test_masks_that_are_not_pointwise_are_refused(mask_mod):
    """They mean another thing when they are called with all indices at once."""
    mask = block_mask(causal)
    mask.mask_mod = mask_mod
    with pytest.raises(errors.UnsupportedOp, match=r"table\[b, j\], not table\[b\]\[j\]"):
        run(attend(mask, None), Q, K, V)


def test_the_sum_of_the_weights_is_refused():
    def attended(q):
        return flex_attention(q, q, q, return_lse=True)

    with pytest.raises(errors.UnsupportedOp, match="without return_lse"):
        run(attended, Q)


def test_what_is_refused_can_be_let_through():
    got = run(attend(None, squared), Q, K, V, options={"unsupported": "allow"})
    torch.testing.assert_close(got.double(), exact("none", squared), rtol=1e-4, atol=1e-4)
