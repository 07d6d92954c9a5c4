"""The Triton kernels of attention under transformers' masks and caches, rolling ones included."""

import pytest
import torch
from attention_rows import VARIANTS, Rows, check
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from triton_set_up import DEVICE, DTYPES, FULL, INTERPRET, law

from bicompile import attention_interface
from bicompile.kernels.attention import gpu
from bicompile.testing import InvarianceViolation

LENGTH, WINDOW = (43, 20) if INTERPRET else (1300, 300)
CHUNKS = [[LENGTH - 13, 12, 1]]
PADS = [(5, "left")]
if INTERPRET:
    gpu.CHUNK, gpu.TILE, gpu.MERGE_ROWS = 32, {2: 16, 4: 16}, 128


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels themselves, their results before the rounding."""
    attention_interface.register()
    monkeypatch.setattr(attention_interface, "_SDPA", lambda *args: gpu.sdpa(*args, dtype=FULL))


def rows(name, dtype=FULL):
    return Rows(VARIANTS[name], LENGTH, dtype, WINDOW, DEVICE)


@law
@pytest.mark.parametrize("name", ["window"] if INTERPRET else VARIANTS)
def test_a_row_keeps_its_bits(name):
    for dtype in DTYPES[:1] if INTERPRET else DTYPES:
        check(rows(name, dtype), CHUNKS, PADS)


@law
@pytest.mark.parametrize("name", ["window", "chunked"])
def test_numbers_are_of_the_row_not_of_its_cache(name, monkeypatch):
    """A planted mask that counts from the first key of a cache that has lost some."""

    def mask(**kwargs):
        return attention_interface.mask(**{**kwargs, "kv_offset": 0})

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, attention_interface.NAME, mask)
    with pytest.raises(InvarianceViolation, match="cache"):
        check(rows(name), CHUNKS, [])


@law
def test_a_window_without_numbers(monkeypatch):
    """What "sdpa" gives to our kernels: slower, other bits, but a row keeps them."""
    with_numbers = rows("window").alone
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks._global_mapping, attention_interface.NAME, masking_utils.sdpa_mask)
    found = rows("window")
    assert not torch.equal(found.alone, with_numbers)
    check(found, [] if INTERPRET else CHUNKS, PADS)


@law
def test_a_lowest_number_hides_no_padding(monkeypatch):
    """What "sdpa" adds to the scores of T5 where a key is not seen is not -inf: the key counts."""
    monkeypatch.setattr(attention_interface, "_biased", sdpa_attention.create_position_bias_mask)
    with pytest.raises(InvarianceViolation, match="padding on the left"):
        check(rows("bias"), [], PADS)
