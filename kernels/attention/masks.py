"""Triton: what a mask lets each row see, found once per call (integers: exact in any order)."""

import torch
import triton
import triton.language as tl

from bicompile.kernels.common.launch import after_others, launch
from bicompile.kernels.common.trees import strides

NO_KEY = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["QUERIES", "ROWS", "S", "PARTS"])
def range_kernel(
    MASK, FIRST, LAST, PLAIN, START, QUERIES, ROWS, S, PARTS, smb, smh, smq, sms,
    BIAS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (batch row, R mask rows): first, last, plain of each row; the first of them all."""
    after_others(PDL)
    b = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    r = part * R + tl.arange(0, R)
    base = MASK + b * smb + (r // QUERIES).to(tl.int64) * smh + (r % QUERIES).to(tl.int64) * smq
    first = tl.full([R], NO_KEY, tl.int32)
    last = tl.full([R], -1, tl.int32)
    count = tl.zeros([R], tl.int32)
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
    plain = (last < first) | (count == last - first + 1)
    i = b * ROWS + r
    tl.store(FIRST + i, first, mask=r < ROWS)
    tl.store(LAST + i, last, mask=r < ROWS)
    tl.store(PLAIN + i, plain.to(tl.int32), mask=r < ROWS)
    tl.store(START + b * PARTS + part, tl.min(first, 0))


def ranges(mask: torch.Tensor, b: int, h: int, q: int, s: int):
    """Visible range of each row of the mask.

    Returns the arrays (mask, first, last, plain, start) and the numbers (parts, strides of the rows
    in first, last and plain over batch, head and query, stride of start over batch, strides of the
    mask over batch, head, query and key); a broadcast axis has stride 0.
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if mask.stride(3) >= 1 << 22:  # an offset inside a tile stays in 32 bits
        mask = mask.contiguous()
    mb, mh, mq, _ = mask.shape
    rows = mh * mq
    per, columns = (1, 2048) if rows * mb <= 256 else (16, 256)
    parts = triton.cdiv(rows, per)
    sizes = (mb * rows,) * 3 + (mb * parts,)
    first, last, plain, start = (
        torch.empty(n, dtype=torch.int32, device=mask.device) for n in sizes
    )
    places = strides(mask.expand(mb, mh, mq, s))
    bias = mask.dtype.is_floating_point
    launch(
        range_kernel, mb * parts, mask, first, last, plain, start, mq, rows, s, parts, *places,
        BIAS=bias, R=per, C=columns, num_warps=4,
    )  # fmt: skip
    own = (0 if mb == 1 else rows, 0 if mh == 1 else mq, 0 if mq == 1 else 1)
    return (mask, first, last, plain, start), (parts, *own, 0 if mb == 1 else parts, *places)
