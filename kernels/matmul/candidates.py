"""Schedules of the Triton matmul that are worth a try (`bicompile.tune`, `.tune_steps`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bicompile.certificate import permits
from bicompile.kernels.matmul.schedules import Schedule
from bicompile.kernels.matmul.table import schedules

SHARED = 232448  # bytes of shared memory that a block of sm_90 may have


def candidates(kind: str, rows: int, certified: bool = False) -> Iterator[Schedule]:
    """Schedules whose tiles suit a number of rows and fit the shared memory.

    Blocks that reach beyond a matrix are slow, so only with masks a tile has more rows: also 64,
    the least that the tensor cores of sm_90 read from shared memory.
    """
    least = max(16, min(1 << (rows.bit_length() - 1), 128))  # rows of a tile
    most = max(16, min(1 << (rows - 1).bit_length(), 128))
    wide = 64 if 16 < rows < 64 else most
    for bm in sorted({least, most, max(16, most // 2) if rows < 256 else most, wide}):
        for s in _certified(bm, kind) if certified else _tiles(bm, rows, factors_of(kind)):
            if s.masked or bm <= (least if s.tma else most):
                yield s


def candidates_in_steps(kind: str, rows: int) -> Iterator[Schedule]:
    """Schedules of one tile of rows, which are whole, with every number of stages.

    The deepest pipeline that fits is not always the fastest in a step: the kernel after it starts
    in the shared memory that it leaves.
    """
    factors = factors_of(kind)
    tiles = itertools.product((16, 32, 48, 64, 96, 128), (128, 256, 512), (4, 8))
    for columns, terms, warps in tiles:
        stage = (rows + columns * factors) * terms * 2
        most = (SHARED - 1024 - rows * columns * 2) // stage
        if columns * factors * terms >= 8192 and columns * factors <= 256:
            for stages in range(2, min(most, 8) + 1):
                if stages * stage >= 64 << 10:
                    yield Schedule(rows, columns, terms, warps, stages, True)


def factors_of(kind: str) -> int:
    """How many products of a kind share their left side."""
    return 2 if kind.endswith("pair") else 1


def _certified(bm: int, kind: str) -> Iterator[Schedule]:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for s in schedules(kind, capability):
        if s.bm == bm and permits("matmul", kind, s):
            yield s


def _tiles(bm: int, rows: int, factors: int) -> Iterator[Schedule]:
    for bn, bk in itertools.product((16, 32, 48, 64, 96, 128, 192, 256), (64, 128, 256, 512)):
        area = bm * bn * factors
        stage = (bm + bn * factors) * bk * 2
        stored = bm * bn * 2
        if not 512 <= area <= 32768 or (bk < 128 if area < 4096 else bk > 128):
            continue
        warps = 8 if area > 16384 else 4
        # One block on a processor, or two.
        for stages in {min(8, (of - 1024 - stored) // stage) for of in (SHARED, SHARED // 2)}:
            if stages < 3 or stages * stage < 48 << 10:
                continue
            yield Schedule(bm, bn, bk, warps, stages, True)
            if rows < 256:
                yield Schedule(bm, bn, bk, warps, stages, True, masked=True)
            if bn % 3 and area <= 8192 * factors and rows <= 256:
                yield Schedule(bm, bn, bk, warps, stages)
        if bm == 128 and area >= 16384 and bk == 64:
            for parts in (1, 2, 4, 8):
                # Stored in parts, beside what is read ahead; what is added passes through, too.
                stages = (SHARED - 1024 - stored // parts * 3) // stage
                if stages < 3 or bn // parts < 24:
                    continue
                yield Schedule(bm, bn, bk, 8, stages, True, False, parts)
                if bn % 3 and factors == 1:
                    yield Schedule(bm, bn, bk, 8, stages, True, True, parts)
    if rows > 256:
        yield Schedule(bm, bm // factors, 64, 8, 3)
