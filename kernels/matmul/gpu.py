"""Triton matmul: one chain over K per output element, so tiles, warps and stages change no bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bicompile.kernels.common.launch import after_others, capability, is_aligned, launch, processors
from bicompile.kernels.common.room import empty_with_room, rows_that_fit
from bicompile.kernels.common.trees import strides
from bicompile.kernels.matmul.schedules import PART, SINGLE, Schedule, kind_of
from bicompile.kernels.matmul.table import schedule
from bicompile.kernels.matmul.tiles import chain, chain_of_blocks, chain_of_boxes, put, tile_of

QKV_ROWS = 128  # up to here q, k and v are one launch; above, each fills the device alone
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["M", "beta", "alpha"])
def matmul_kernel(
    A, B, B2, C, Y, M, N, K, sab, sam, sak, sbb, sbk, sbn, scb, scm, scn, beta, alpha,
    END: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Y = A @ B and what END says; program (matrix, tile)."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    batch = (pid // (num_m * num_n)).to(tl.int64)
    tile_m, tile_n = tile_of(pid % (num_m * num_n), num_m, num_n)
    y, y2 = chain(
        A + batch * sab, B + batch * sbb, B2, tile_m * BM, tile_n * BN, M, N, K, sam, sak, sbk, sbn,
        BM, BN, BK, EVEN_K, KIND, END == "swiglu",
    )  # fmt: skip
    put(
        y, y2, C + batch * scb, Y + batch * M * N, tile_m * BM, tile_n * BN, M, N, scm, scn,
        beta, alpha, END, TYPE, False, 1, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "beta", "alpha"])
def block_kernel(
    A, B, B2, REST, REST2, C, Y, Y_REST, M, N, K, sam, sak, scm, scn, beta, alpha,
    END: tl.constexpr, TYPE: tl.constexpr, EVEN_K: tl.constexpr, ALONG_M: tl.constexpr,
    ALONG_K: tl.constexpr, MASKED: tl.constexpr, PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for one matrix of half precision, through tensor descriptors.

    A tile has BN + BR columns. A, B, B2 and Y are read and stored in blocks of BN, those that end
    in REST in blocks of BR. The last tiles end where the matrix does: what they share with their
    neighbours both store, with equal bits, because blocks that reach beyond a matrix are slow.
    MASKED: A and Y are pointers, and rows beyond the matrix are left out.
    """
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN + BR)
    tiles = num_m * num_n
    step = tl.num_programs(0) if PERSISTENT else tiles
    for tile in tl.range(tl.program_id(0), tiles, step, flatten=PERSISTENT):
        tile_m, tile_n = tile_of(tile, num_m, num_n)
        m0 = tile_m * BM
        if not MASKED:
            m0 = tl.minimum(m0, tl.maximum(M - BM, 0))
        n0 = tl.minimum(tile_n * (BN + BR), tl.maximum(N - BN - BR, 0))
        y, y2, rest, rest2 = chain_of_blocks(
            A, B, B2, REST, REST2, m0, n0, M, K, sam, sak, BM, BN, BR, BK, EVEN_K,
            ALONG_M, ALONG_K, MASKED, END == "swiglu",
        )  # fmt: skip
        put(
            y, y2, C, Y, m0, n0, M, N, scm, scn, beta, alpha, END, TYPE, not MASKED, PARTS, BM, BN
        )  # fmt: skip
        if BR:
            put(
                rest, rest2, C, Y_REST, m0, n0 + BN, M, N, scm, scn, beta, alpha,
                END, TYPE, not MASKED, PARTS, BM, BR,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def grouped_kernel(
    A, B, ENDS, Y, M, N, K, GROUPS, sam, sak, sbg, sbk, sbn, se,
    KIND: tl.constexpr, TYPE: tl.constexpr, EVEN_K: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Runs of rows of A times a matrix each; program (tile of rows of a run, tile of columns).

    The rows behind the last run are one more run, whose chain has no terms.
    """
    after_others(PDL)
    num_n = tl.cdiv(N, BN)
    tile = tl.program_id(0) // num_n
    g = tl.arange(0, G)
    end = tl.load(ENDS + g * se, mask=g < GROUPS, other=M).to(tl.int32)
    begin = tl.load(ENDS + (g - 1) * se, mask=(g > 0) & (g <= GROUPS), other=0).to(tl.int32)
    tiles = tl.where(g <= GROUPS, tl.cdiv(end - begin, BM), 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    group = tl.sum(tl.where(mine, g, 0), 0)
    m0 = tl.sum(tl.where(mine, begin + (tile - before) * BM, 0), 0)
    m1 = tl.sum(tl.where(mine, end, 0), 0)
    k = tl.where((group < GROUPS) & (m0 < m1), K, 0)
    n0 = tl.program_id(0) % num_n * BN
    matrix = B + tl.minimum(group, GROUPS - 1).to(tl.int64) * sbg
    y, y2 = chain(
        A, matrix, matrix, m0, n0, m1, N, k, sam, sak, sbk, sbn, BM, BN, BK, EVEN_K, KIND, False
    )
    put(y, y2, Y, Y, m0, n0, m1, N, 0, 0, 0.0, 1.0, "", TYPE, False, 1, BM, BN)


@triton.jit(do_not_specialize=["M"])
def qkv_kernel(
    A, Q, K, V, CQ, CK, CV, YQ, YK, YV, M, NQ, NK, NV, D, sam, sak, sbd, sbn,
    END: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A @ Q, A @ K, A @ V, each with its bias: the columns of all three are numbered through."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    tile_m = tl.program_id(0) % num_m
    tile_n = tl.program_id(0) // num_m
    in_q = tl.cdiv(NQ, BN)
    in_k = in_q + tl.cdiv(NK, BN)
    is_q = tile_n < in_q
    is_k = tile_n < in_k
    b = tl.where(is_q, Q, tl.where(is_k, K, V))
    c = tl.where(is_q, CQ, tl.where(is_k, CK, CV))
    y = tl.where(is_q, YQ, tl.where(is_k, YK, YV))
    n = tl.where(is_q, NQ, tl.where(is_k, NK, NV))
    n0 = (tile_n - tl.where(is_q, 0, tl.where(is_k, in_q, in_k))) * BN
    acc, acc2 = chain(
        A, b, b, tile_m * BM, n0, M, n, D, sam, sak, sbd, sbn, BM, BN, BK, EVEN_K, KIND, False
    )
    put(acc, acc2, c, y, tile_m * BM, n0, M, n, 0, 1, 1.0, 1.0, END, TYPE, False, 1, BM, BN)


@triton.jit(do_not_specialize=["M", "at_q", "at_k", "at_v"])
def qkv_block_kernel(
    A, W, CQ, CK, CV, YQ, YK, YV, M, NQ, NK, NV, D, sam, sak, at_q, at_k, at_v,
    END: tl.constexpr, TYPE: tl.constexpr, EVEN_K: tl.constexpr, ALONG_M: tl.constexpr,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors: W has all three, each at a place of its own."""
    after_others(PDL)
    num_m = tl.cdiv(M, BM)
    in_q = tl.cdiv(NQ, BN)
    in_k = in_q + tl.cdiv(NK, BN)
    tile_m, tile_n = tile_of(tl.program_id(0), num_m, in_k + tl.cdiv(NV, BN))
    m0 = tile_m * BM
    if not MASKED:
        m0 = tl.minimum(m0, tl.maximum(M - BM, 0))
    is_q = tile_n < in_q
    is_k = tile_n < in_k
    c = tl.where(is_q, CQ, tl.where(is_k, CK, CV))
    y = tl.where(is_q, YQ, tl.where(is_k, YK, YV))
    n = tl.where(is_q, NQ, tl.where(is_k, NK, NV))
    at = tl.where(is_q, at_q, tl.where(is_k, at_k, at_v))
    n0 = (tile_n - tl.where(is_q, 0, tl.where(is_k, in_q, in_k))) * BN
    n0 = tl.minimum(n0, n - BN)
    acc = chain_of_boxes(A, W, at, m0, n0, M, D, sam, sak, BM, BN, BK, EVEN_K, ALONG_M, MASKED)
    put(acc, acc, c, y, m0, n0, M, n, 0, 1, 1.0, 1.0, END, TYPE, False, 1, BM, BN)


def _kind(x: torch.Tensor, tf32: bool) -> str:
    return kind_of(x.dtype, tf32, capability(x.device))


def _choose(kind: str, a, weights, n: int, chosen: Schedule | None) -> Schedule:
    """The schedule for n columns of a [B, M, K] @ weights; no weights: descriptors are not used.

    One that is given and needs descriptors, which these operands cannot have, is not obeyed.
    """
    blocks = bool(weights) and _fits_blocks(a, weights, n)
    if chosen is not None:
        s = chosen if blocks or not chosen.tma else SINGLE[kind]
    else:
        device = capability(a.device), processors(a.device)
        room = rows_that_fit(a[0]) if blocks else 0
        s = schedule(kind, *device, a.shape[1], n * a.shape[0], a.shape[2], blocks, room)
    assert not kind.startswith("ieee") or s.bk == PART
    return s


def _fits_blocks(a, weights, n: int) -> bool:
    """Whether tensor descriptors can stand for these operands, and for a result of n columns."""
    fits = a.shape[0] == 1 and a.shape[2] > 0 and n * a.element_size() % 16 == 0
    return fits and all(_is_blocked(x[0]) or _is_blocked(x[0].t()) for x in (a, *weights))


def _is_blocked(x: torch.Tensor) -> bool:
    """Whether the rows of x [R, C] are dense and start at multiples of 16 bytes."""
    row, column = x.stride()
    return (column == 1 or x.shape[1] == 1) and row * x.element_size() % 16 == 0 and is_aligned(x)


def _described(
    x: torch.Tensor, rows: int, columns: int, turned: bool, room: int = 0
) -> TensorDescriptor:
    """Blocks of x [R, C]; turned: it lies as [C, R] in memory, and so do they.

    room: R if more, so that rows behind x are read too.
    """
    if turned:
        return _described(x.t(), columns, rows, False)
    return TensorDescriptor(x, [max(len(x), room), x.shape[1]], [x.stride(0), 1], [rows, columns])


def _launch(a, b, c=None, *, tf32, end="", beta=0.0, alpha=1.0, b2=None, chosen=None):
    """a [B, M, K], b and b2 [B, K, N], c None or broadcast to [B, M, N] -> [B, M, N]."""
    (batch, m, k), n = a.shape, b.shape[2]
    like = {"dtype": a.dtype, "device": a.device}
    if end == "swiglu":
        out = empty_with_room(m, n, **like)[None]  # what follows is a product
    else:
        out = torch.empty((batch, m, n), **like)
    if out.numel() == 0:
        return out
    weights = (b,) if b2 is None else (b, b2)
    kind = _kind(a, tf32)
    s = _choose(kind if b2 is None else f"{kind} pair", a, weights, n, chosen)
    c, c_strides = (out, (0, 0, 0)) if c is None else (c, strides(c))
    tiles = triton.cdiv(m, s.bm) * triton.cdiv(n, s.bn)
    common = {"END": end, "TYPE": TYPES[a.dtype], "BM": s.bm, "BK": s.bk}
    common |= {"num_warps": s.warps, "num_stages": s.stages}
    if s.tma:
        along_m, along_k = not _is_blocked(a[0]), not _is_blocked(b[0])
        left = a[0] if s.masked else _described(a[0], s.bm, s.bk, along_m, rows_that_fit(a[0]))

        def blocks(bn: int) -> tuple[TensorDescriptor | None, ...]:
            """Of the weights, the first again for a second that is not there, and of the result."""
            if bn == 0:
                return None, None, None
            of_weights = [_described(w[0], s.bk, bn, along_k) for w in weights]
            y = out if s.masked else _described(out[0], s.bm, bn // s.parts, False)
            return of_weights[0], of_weights[-1], y

        (first, second, y), (rest, rest2, y_rest) = map(blocks, s.columns)
        launch(
            block_kernel, min(tiles, processors(a.device)) if s.persistent else tiles,
            left, first, second, rest, rest2, c, y, y_rest, m, n, k, *strides(a)[1:],
            *c_strides[1:], float(beta), float(alpha), **common,
            EVEN_K=s.masked and k % s.bk == 0, ALONG_M=along_m, ALONG_K=along_k, MASKED=s.masked,
            PERSISTENT=s.persistent, PARTS=s.parts, BN=s.columns[0], BR=s.columns[1],
        )  # fmt: skip
    else:
        launch(
            matmul_kernel, batch * tiles, a, b, weights[-1], c, out, m, n, k, *strides(a),
            *strides(b), *c_strides, float(beta), float(alpha), **common,
            KIND=kind, EVEN_K=k % s.bk == 0, BN=s.bn,
        )  # fmt: skip
    return out


def mm(self, mat2, tf32, chosen=None):
    """self [M, K] @ mat2 [K, N]."""
    return _launch(self[None], mat2[None], tf32=tf32, chosen=chosen)[0]


def bmm(self, mat2, tf32, chosen=None):
    """self [B, M, K] @ mat2 [B, K, N]."""
    return _launch(self, mat2, tf32=tf32, chosen=chosen)


def addmm(self, mat1, mat2, beta, alpha, tf32, chosen=None):
    """alpha * mat1 @ mat2 + beta * self, one rounding; beta 0 ignores self."""
    return baddbmm(self, mat1[None], mat2[None], beta, alpha, tf32, chosen)[0]


def baddbmm(self, batch1, batch2, beta, alpha, tf32, chosen=None):
    """alpha * batch1 @ batch2 + beta * self, one rounding; beta 0 ignores self."""
    c = self.expand(batch1.shape[0], batch1.shape[1], batch2.shape[2]) if beta else None
    end = "addmm" if beta else "scale"
    return _launch(batch1, batch2, c, tf32=tf32, end=end, beta=beta, alpha=alpha, chosen=chosen)


def grouped_mm(self, mat2, offs, tf32, chosen=None):
    """Each run of rows of self [M, K], which end at offs [G], @ its matrix of mat2 [G, K, N]."""
    (m, k), (groups, _, n) = self.shape, mat2.shape
    out = torch.empty((m, n), dtype=self.dtype, device=self.device)
    if out.numel() == 0 or groups == 0:
        return out.zero_()
    kind = _kind(self, tf32)
    of_a_run = self[None, : triton.cdiv(m, groups)]
    s = _choose(kind, of_a_run, (), n, chosen)
    # The last tile of each run, and of the rows behind them, may be a part of one.
    tiles = triton.cdiv(m, s.bm) + min(m, groups + 1)
    launch(
        grouped_kernel, tiles * triton.cdiv(n, s.bn), self, mat2, offs, out, m, n, k, groups,
        *strides(self), *strides(mat2), offs.stride(0), KIND=kind, TYPE=TYPES[self.dtype],
        EVEN_K=k % s.bk == 0, G=triton.next_power_of_2(groups + 1), BM=s.bm, BN=s.bn, BK=s.bk,
        num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return out


def mm_add(self, mat2, other, tf32, chosen=None):
    """self @ mat2, rounded, + other, rounded again."""
    return _launch(self[None], mat2[None], other[None], tf32=tf32, end="add", chosen=chosen)[0]


def swiglu(self, gate, up, tf32, chosen=None):
    """silu(self @ gate) * (self @ up), each op rounded."""
    if gate.stride() != up.stride():
        up = torch.empty_like(gate).copy_(up)
        gate = gate if gate.stride() == up.stride() else gate.contiguous()
    return _launch(self[None], gate[None], tf32=tf32, end="swiglu", b2=up[None], chosen=chosen)[0]


def qkv_proj(self, q, k, v, q_bias, k_bias, v_bias, tf32, chosen=None):
    """self @ q + q_bias, self @ k + k_bias, self @ v + v_bias."""
    weights, biases = (q, k, v), (q_bias, k_bias, v_bias)
    m, d = self.shape
    columns = [w.shape[1] for w in weights]
    alike = q.stride() == k.stride() == v.stride() and len({b is None for b in biases}) == 1
    if not alike or not 0 < m <= QKV_ROWS or 0 in (d, *columns):
        pairs = zip(weights, biases, strict=True)
        return tuple(
            mm(self, w, tf32, chosen) if b is None else addmm(b, self, w, 1.0, 1.0, tf32, chosen)
            for w, b in pairs
        )
    kind = _kind(self, tf32)
    s = _choose_for_several(kind, self, weights, chosen)
    out = [torch.empty((m, n), dtype=self.dtype, device=self.device) for n in columns]
    added = out if q_bias is None else [b.contiguous() for b in biases]
    tiles = triton.cdiv(m, s.bm) * sum(triton.cdiv(n, s.bn) for n in columns)
    common = {"END": "" if q_bias is None else "addmm", "TYPE": TYPES[self.dtype]}
    common |= {"BM": s.bm, "BN": s.bn, "BK": s.bk, "num_warps": s.warps, "num_stages": s.stages}
    if s.tma:
        along_m = not _is_blocked(self)
        left = self if s.masked else _described(self, s.bm, s.bk, along_m, rows_that_fit(self))
        boxes, places = _three_as_one(weights, s.bn, s.bk)
        launch(
            qkv_block_kernel, tiles, left, boxes, *added, *out, m, *columns, d, *strides(self),
            *places, **common, EVEN_K=s.masked and d % s.bk == 0, ALONG_M=along_m, MASKED=s.masked,
        )  # fmt: skip
    else:
        launch(
            qkv_kernel, tiles, self, *weights, *added, *out, m, *columns, d, *strides(self),
            *strides(q), **common, KIND=kind, EVEN_K=d % s.bk == 0,
        )  # fmt: skip
    return tuple(out)


def _choose_for_several(kind, a, weights, chosen):
    """The schedule of a [M, K] times several matrices of equal strides (see `_choose`)."""
    columns = [w.shape[1] for w in weights]
    blocks = _is_blocked(weights[0].t()) and _are_near(weights)
    blocks = blocks and all(_fits_blocks(a[None], [w[None]], w.shape[1]) for w in weights)
    least = min(columns) if blocks else 0
    if chosen is not None:
        return chosen if chosen.serves_several(least) else SINGLE[kind]
    room = rows_that_fit(a) if blocks else 0
    size = len(a), sum(columns), a.shape[1]
    return schedule(kind, capability(a.device), processors(a.device), *size, blocks, room, least)


def _are_near(weights) -> bool:
    """Whether one tensor descriptor can reach them all: its steps in bytes have 40 bits."""
    places = [w.data_ptr() for w in weights]
    return max(places) - min(places) < 1 << 40


def _three_as_one(weights, bn, bk):
    """Boxes of three weights [K, N] of equal strides that lie as [N, K], and the place of each.

    Seen from the first in memory, each of the other two is one step along an axis of its own.
    """
    first, *others = sorted(range(3), key=lambda i: weights[i].data_ptr())
    base, places, steps = weights[first].t(), [0, 0, 0], []
    for axis, i in enumerate(others, 1):
        step = (weights[i].data_ptr() - base.data_ptr()) // base.element_size()
        places[i] = axis if step else 0
        steps.append(step or base.stride(0))
    shape = [2, 2, max(w.shape[1] for w in weights), base.shape[1]]
    boxes = TensorDescriptor(base, shape, [*steps, base.stride(0), 1], [1, 1, bn, bk])
    return boxes, places
