"""Triton device functions of matmul: one chain over K per output element, and what follows it.

fp32 in full precision is summed in fp64 ("double") where the device is fast at it. Elsewhere
("ieee") chains of PART terms are summed one after the other: a chain of thousands is less accurate
than what PyTorch calls.
"""

import triton
import triton.language as tl

from bicompile.kernels.common.trees import INTERPRET, exp

GROUP = tl.constexpr(8)  # rows of tiles that share their columns in L2


@triton.jit
def tile_of(tile, num_m, num_n):
    """Tile number -> (tile row, tile column), GROUP rows of tiles at a time; or all, if few."""
    group = tl.where(num_m <= 2 * GROUP, num_m, GROUP)
    per = group * num_n
    first = tile // per * group
    size = tl.minimum(num_m - first, group)
    return first + tile % per % size, tile % per // size


@triton.jit
def _tf32(x):
    """fp32 rounded to nearest in tf32; the tensor cores would cut it off."""
    if not INTERPRET:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return x


@triton.jit
def zeros(BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr):
    """Where the chains of a tile begin."""
    return tl.zeros([BM, BN], tl.float64 if KIND == "double" else tl.float32)


@triton.jit
def add_dot(x, y, acc, KIND: tl.constexpr):
    """acc + x @ y. ieee: a chain of its own for BK terms, then one sum: fewer large roundings."""
    if KIND == "double":
        acc = tl.dot(x.to(tl.float64), y.to(tl.float64), acc, out_dtype=tl.float64)
    elif KIND == "ieee":
        part = tl.dot(x, y, input_precision="ieee")
        acc = tl.math.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)  # "+" becomes one chain
    elif KIND == "tf32":
        acc = tl.dot(_tf32(x), _tf32(y), acc, input_precision="tf32")
    else:
        acc = tl.dot(x, y, acc)
    return acc


@triton.jit
def chain(
    A, B, B2, m0, n0, M, N, K, sam, sak, sbk, sbn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    KIND: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """A @ B of the tile at (m0, n0), and with TWO also A @ B2, fp32: K in rising order from +0.

    What lies outside the matrices adds 0 * 0.
    """
    rm = m0 + tl.arange(0, BM)
    rn = n0 + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    a = A + rm.to(tl.int64)[:, None] * sam + rk.to(tl.int64)[None, :] * sak
    at = rk.to(tl.int64)[:, None] * sbk + rn.to(tl.int64)[None, :] * sbn
    b = B + at
    b2 = B2 + at
    step_a = tl.full([], BK, tl.int64) * sak
    step_b = tl.full([], BK, tl.int64) * sbk
    in_m = rm[:, None] < M
    in_n = rn[None, :] < N
    acc = zeros(BM, BN, KIND)
    acc2 = acc
    for k in tl.range(0, K, BK):
        if EVEN_K:
            in_a = in_m
            in_b = in_n
        else:
            in_a = in_m & (rk[None, :] < K - k)
            in_b = in_n & (rk[:, None] < K - k)
        x = tl.load(a, mask=in_a, other=0.0)
        acc = add_dot(x, tl.load(b, mask=in_b, other=0.0), acc, KIND)
        if TWO:
            acc2 = add_dot(x, tl.load(b2, mask=in_b, other=0.0), acc2, KIND)
            b2 += step_b
        a += step_a
        b += step_b
    return acc.to(tl.float32), acc2.to(tl.float32)


@triton.jit
def chain_of_blocks(
    A, B, B2, REST, REST2, m0, n0, M, K, sam, sak,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    ALONG_M: tl.constexpr, ALONG_K: tl.constexpr, MASKED: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, whose blocks are 0 outside the matrices.

    With BR, also the BR columns behind those BN, which REST and REST2 read. MASKED: A is a pointer.
    ALONG_M: A lies as [K, M] in memory; ALONG_K: B lies as [N, K].
    """
    acc = tl.zeros([BM, BN], tl.float32)
    acc2 = acc
    rest = tl.zeros([BM, BR if BR else BN], tl.float32)
    rest2 = rest
    for k in tl.range(0, K, BK):
        if MASKED:
            x = _masked(A, m0, k, M, K, sam, sak, BM, BK, EVEN_K)
        else:
            x = _block(A, m0, k, ALONG_M)
        acc = tl.dot(x, _block(B, k, n0, ALONG_K), acc)
        if BR:
            rest = tl.dot(x, _block(REST, k, n0 + BN, ALONG_K), rest)
        if TWO:
            acc2 = tl.dot(x, _block(B2, k, n0, ALONG_K), acc2)
            if BR:
                rest2 = tl.dot(x, _block(REST2, k, n0 + BN, ALONG_K), rest2)
    return acc, acc2, rest, rest2


@triton.jit
def chain_of_boxes(
    A, W, at, m0, n0, M, K, sam, sak,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
    ALONG_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The same where W [2, 2, N, K] has a matrix at (0, 0), (1, 0) and (0, 1): 0, 1 and 2."""
    acc = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        if MASKED:
            x = _masked(A, m0, k, M, K, sam, sak, BM, BK, EVEN_K)
        else:
            x = _block(A, m0, k, ALONG_M)
        w = tl.reshape(W.load([at % 2, at // 2, n0, k]), [BN, BK])
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def _masked(A, m0, k0, M, K, sam, sak, BM: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The block of A at (m0, k0) through pointers."""
    row = (m0 + tl.arange(0, BM))[:, None]
    k = (k0 + tl.arange(0, BK))[None, :]
    inside = row < M
    if not EVEN_K:
        inside &= k < K
    return tl.load(A + row.to(tl.int64) * sam + k.to(tl.int64) * sak, mask=inside, other=0.0)


@triton.jit
def _block(X, row, column, TURNED: tl.constexpr):
    """The block of X at (row, column); TURNED: X lies transposed in memory."""
    if TURNED:
        y = X.load([column, row]).T
    else:
        y = X.load([row, column])
    return y


@triton.jit
def finish(
    y, y2, C, m0, n0, M, N, scm, scn, beta, alpha,
    END: tl.constexpr, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What follows the chain; every op that was fused rounds as it does alone.

    "scale": alpha * y. "addmm": alpha * y + beta * C, rounded once. "add": y, rounded, + C.
    "swiglu": silu(y) * y2, as x / (1 + exp(-x)).
    """
    if END == "scale":
        y = y * alpha
    elif END == "addmm":
        y = y * alpha + _added(C, m0, n0, M, N, scm, scn, BM, BN) * beta
    elif END == "add":
        y = y.to(TYPE).to(tl.float32) + _added(C, m0, n0, M, N, scm, scn, BM, BN)
    elif END == "swiglu":
        gate = y.to(TYPE).to(tl.float32)
        gate = tl.div_rn(gate, exp(-gate) + 1.0).to(TYPE).to(tl.float32)
        y = gate * y2.to(TYPE).to(tl.float32)
    return y.to(TYPE)


@triton.jit
def _added(C, m0, n0, M, N, scm, scn, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of what is added, [BM, BN]."""
    row = (m0 + tl.arange(0, BM)).to(tl.int64)[:, None]
    column = (n0 + tl.arange(0, BN)).to(tl.int64)[None, :]
    inside = (row < M) & (column < N)
    return tl.load(C + row * scm + column * scn, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put(
    y, y2, C, Y, m0, n0, M, N, scm, scn, beta, alpha,
    END: tl.constexpr, TYPE: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Finish and store a tile, in PARTS column parts: less shared memory, so one more stage."""
    if PARTS > 1:
        left, right = _halves(y, BM, BN)
        left2, right2 = _halves(y2, BM, BN)
        put(
            left, left2, C, Y, m0, n0, M, N, scm, scn, beta, alpha,
            END, TYPE, TMA, PARTS // 2, BM, BN // 2,
        )  # fmt: skip
        put(
            right, right2, C, Y, m0, n0 + BN // 2, M, N, scm, scn, beta, alpha,
            END, TYPE, TMA, PARTS // 2, BM, BN // 2,
        )  # fmt: skip
    else:
        y = finish(y, y2, C, m0, n0, M, N, scm, scn, beta, alpha, END, TYPE, BM, BN)
        if TMA:
            Y.store([m0, n0], y)
        else:
            row = (m0 + tl.arange(0, BM)).to(tl.int64)[:, None]
            column = (n0 + tl.arange(0, BN)).to(tl.int64)[None, :]
            tl.store(Y + row * N + column, y, mask=(row < M) & (column < N))


@triton.jit
def _halves(y, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] -> its left and its right half."""
    return tl.split(tl.permute(tl.reshape(y, [BM, 2, BN // 2]), [0, 2, 1]))
