"""Rows of one block that stay in registers: [R, L, J], each thread with its lanes of all J rows.

The J rows of lanes are loaded and stored one by one: each is then read as wide as its threads
allow, and no thread has to know another's terms before there is one sum for each lane.
"""

import triton
import triton.language as tl

from bicompile.kernels.common.trees import pair_tree

NODES = tl.constexpr(8)  # no more warps share a row: below these nodes, its tree is theirs alone


@triton.jit
def places(J: tl.constexpr, L: tl.constexpr, FROM: tl.constexpr = 0):
    """[1, L, J]: the place of each term in its block; of J rows of lanes from FROM on."""
    return (tl.arange(0, L)[:, None] + (tl.arange(0, J)[None, :] + FROM) * L)[None, :, :]


@triton.jit
def load_block(
    X, row, here, K, stride, other, J: tl.constexpr, L: tl.constexpr, per=1,
    FROM: tl.constexpr = 0, STEP: tl.constexpr = 1,
):  # fmt: skip
    """[R, L, J] fp32: all terms of rows of one block, else `other`. row, here: [R, 1, 1].

    per: how many neighbouring terms share an element. The rows of lanes are those numbered FROM,
    FROM + STEP, ...
    """
    if J > 1:
        x = load_block(X, row, here, K, stride, other, J // 2, L, per, FROM, 2 * STEP)
        y = load_block(X, row, here, K, stride, other, J // 2, L, per, FROM + STEP, 2 * STEP)
        x = tl.reshape(tl.join(x, y), [x.shape[0], L, J])
    else:
        k = places(1, L, FROM)
        at = row + (k // per).to(tl.int64) * stride
        x = tl.load(X + at, mask=here & (k < K), other=other).to(tl.float32)
    return x


@triton.jit
def store_block(
    OUT, y, here, K, J: tl.constexpr, L: tl.constexpr,
    FROM: tl.constexpr = 0, STEP: tl.constexpr = 1,
):  # fmt: skip
    """Write y [R, L, J]. OUT: [R, 1, 1], where the rows begin."""
    if J > 1:
        even, odd = tl.split(tl.reshape(y, [y.shape[0], L, J // 2, 2]))
        store_block(OUT, even, here, K, J // 2, L, FROM, 2 * STEP)
        store_block(OUT, odd, here, K, J // 2, L, FROM + STEP, 2 * STEP)
    else:
        k = places(1, L, FROM)
        tl.store(OUT + k, y.to(OUT.dtype.element_ty), mask=here & (k < K))


@triton.jit
def held_max(x):
    """[R, L, J] -> [R]: exact, so its order is free."""
    return tl.max(tl.max(x, 2), 1)


@triton.jit
def held_sum(x, R: tl.constexpr, J: tl.constexpr, L: tl.constexpr):
    """[R, L, J] fp64 -> [R]: the sum in the order of `trees`.

    Where warps share a row, each has all nodes of the last levels of its tree at once.
    """
    for i in tl.static_range(8):
        if (J >> (i + 1)) >= 1:
            x = tl.sum(tl.reshape(x, [R, L, 2, J >> (i + 1)]), 2)
    x = tl.reshape(x, [R, L])
    if R == 1 and J > 1:
        x = pair_tree(tl.reshape(x, [NODES, L // NODES]), NODES, L // NODES)
        x = tl.gather(tl.reshape(x, [1, NODES]), tl.arange(0, NODES)[None, :], 1)
        y = pair_tree(x, 1, NODES)
    else:
        y = pair_tree(x, R, L)
    return y
