"""Triton: what a mask lets each row see (integers: exact in any order)."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides

NO_KEY = tl.constexpr(1 << 30)
FAR = 1 << 22  # strides of keys and columns stay below this: offsets in a tile have 32 bits


@triton.jit(do_not_specialize=["QUERIES", "ROWS", "S", "PARTS"])
def range_kernel(
    MASK, VISIBLE, QUERIES, ROWS, S, PARTS, smb, smh, smq, sms,
    BIAS: tl.constexpr, NUMBERED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (batch row, R mask rows): first, last, plain and start of each row."""
    after_others(PDL)
    b = (tl.program_id(0) // PARTS).to(tl.int64)
    r = tl.program_id(0) % PARTS * R + tl.arange(0, R)
    base = MASK + b * smb + (r // QUERIES).to(tl.int64) * smh + (r % QUERIES).to(tl.int64) * smq
    first = tl.full([R], NO_KEY, tl.int32)
    last = tl.full([R], -1, tl.int32)
    count = tl.zeros([R], tl.int32)
    start = tl.full([R], NO_KEY, tl.int32)
    for k0 in range(0, S, C):
        key = k0 + tl.arange(0, C)[None, :]
        there = (r < ROWS)[:, None] & (key < S)
        x = tl.load(base[:, None] + key.to(tl.int64) * sms, mask=there, other=0)
        if BIAS:
            x = x.to(tl.float32)
            seen = there & (x != float("-inf"))
            count += tl.sum((seen & (x == 0.0)).to(tl.int32), 1)
        else:
            seen = there & (x != 0)
            count += tl.sum(seen.to(tl.int32), 1)
        first = tl.minimum(first, tl.min(tl.where(seen, key, NO_KEY), 1))
        last = tl.maximum(last, tl.max(tl.where(seen, key, -1), 1))
        if NUMBERED:
            start = tl.minimum(start, tl.min(tl.where(seen, key + 1 - x, NO_KEY), 1))
    plain = (last < first) | (count == last - first + 1)
    i = VISIBLE + (b * ROWS + r) * 4
    tl.store(i, first, mask=r < ROWS)
    tl.store(i + 1, last, mask=r < ROWS)
    tl.store(i + 2, plain.to(tl.int32), mask=r < ROWS)
    tl.store(i + 3, start if NUMBERED else first, mask=r < ROWS)


def _readable(mask: torch.Tensor) -> torch.Tensor:
    """The mask with four axes, as bytes where it is boolean."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask if mask.stride(3) < FAR else mask.contiguous()


def visible_range(attn_mask: torch.Tensor) -> torch.Tensor:
    """What each row of a mask sees, int32 [B, H, Q, 4] with the axes of the mask.

    First key, last key, 1 if every key between is seen with bias 0, and the key from which tiles
    are counted: the first, or where key number 1 is or was, if the mask holds numbers.
    """
    mask = _readable(attn_mask)
    b, h, q, s = mask.shape
    rows = h * q
    per, columns = (1, 2048) if rows * b <= 256 else (16, 256)
    parts = triton.cdiv(rows, per)
    visible = torch.empty((b, h, q, 4), dtype=torch.int32, device=mask.device)
    if visible.numel() == 0:
        return visible
    launch(
        range_kernel, b * parts, mask, visible, q, rows, s, parts, *strides(mask),
        BIAS=mask.is_floating_point(), NUMBERED=mask.dtype == torch.int32, R=per, C=columns,
        num_warps=4,
    )  # fmt: skip
    return visible


def mask_arguments(attn_mask: torch.Tensor, visible: torch.Tensor, shape: tuple[int, ...]):
    """Mask and ranges for the kernel, and their strides over [B, H, Q(, S)]: 0 for a broadcast."""
    mask = _readable(attn_mask)
    return (mask, visible), (*strides(visible)[:3], *strides(mask.expand(shape)))
