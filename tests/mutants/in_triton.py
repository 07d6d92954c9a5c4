"""Faults in the Triton kernels that their laws see in the interpreter, without a GPU."""

from __future__ import annotations

from .mutant import Mutant

ROWS = ("tests/test_triton_rows.py",)
MATMUL = ("tests/test_triton_matmul.py",)
ATTENTION = ("tests/test_triton_attention.py",)
ATTENTION_GRADIENTS = (*ATTENTION, "-k", "gradients")
SCAN = ("tests/test_triton_scan.py",)
CONVOLUTION = ("tests/test_triton_convolution.py",)

MUTANTS = (
    Mutant(
        "lanes follow the rows",
        "kernels/reduce/gpu.py",
        "    j, lanes = row_shape(k)\n",
        "    j, lanes = row_shape(k if m > 3 else k // 2)\n",
        "few rows are summed in blocks of another size",
        ROWS,
    ),
    Mutant(
        "a sum without a mask",
        "kernels/reduce/gpu.py",
        "            x = tl.where(k < K, x, 0.0)\n",
        "            pass\n",
        "places behind the end of a row enter variances",
        ROWS,
    ),
    Mutant(
        "the blocks of a row in parts lose the last",
        "kernels/reduce/gpu.py",
        "            mask = here & (first + i < end)",
        "            mask = here & (first + i < tl.maximum(end - 1, 1))",
        "few long rows, whose blocks several programs fold, miss terms",
        (*ROWS, "-k", "parts"),
    ),
    Mutant(
        "blocks are added by halves",
        "kernels/common/trees.py",
        "            v = _pairs(tl.reshape(v, [R, 2, J >> (i + 1), W]), 1, MUL)",
        "            v = _pairs(tl.reshape(v, [R, J >> (i + 1), 2, W]), 2, MUL)",
        "the pinned order of a block",
        ("tests/test_triton_order.py",),
    ),
    Mutant(
        "lanes are joined from afar",
        "kernels/common/trees.py",
        "            v = _pairs(tl.reshape(v, [R, W >> (i + 1), 2]), 2, MUL)",
        "            v = _pairs(tl.reshape(v, [R, 2, W >> (i + 1)]), 1, MUL)",
        "the pinned order of the lanes",
        ("tests/test_triton_order.py",),
    ),
    Mutant(
        "a row reads behind its end",
        "kernels/common/trees.py",
        "mask=here & (k < K), other=other)",
        "mask=here, other=other)",
        "elements of the next row are read",
        ROWS,
    ),
    Mutant(
        "the sum of a softmax is in float32",
        "kernels/softmax/gpu.py",
        "        total = block_sum(e.to(tl.float64), R, J, L).to(tl.float32)[:, None, None]",
        "        total = block_sum(e, R, J, L)[:, None, None]",
        "rows of one block have another rounding than long ones",
        ROWS,
    ),
    Mutant(
        "the gradient of a query has no holes",
        "kernels/attention_backward/gpu.py",
        "alike = (tl.min((plain > 0) &",
        "alike = (tl.min((plain > -1) &",
        "keys within the range of a row are added though its mask leaves them out",
        ATTENTION_GRADIENTS,
    ),
    Mutant(
        "the gradient of a key has no holes",
        "kernels/attention_backward/gpu.py",
        "(last >= high) & (whole > 0)",
        "(last >= high) & (whole > -1)",
        "queries are added though their mask leaves the key out",
        ATTENTION_GRADIENTS,
    ),
    Mutant(
        "the gradient of a key reads no mask",
        "kernels/attention_backward/gpu.py",
        "(sees & (whole == 0))",
        "(sees & (whole < 0))",
        "at the edges of what sees a key, holes of the mask are added",
        ATTENTION_GRADIENTS,
    ),
    Mutant(
        "blocks of a scan follow the rows",
        "kernels/scan/gpu.py",
        "    w = min(triton.next_power_of_2(k), BLOCK)\n",
        "    w = min(triton.next_power_of_2(k), BLOCK if m * n > 2 else 16)\n",
        "few rows are summed in blocks of another size",
        SCAN,
    ),
    Mutant(
        "a block of a scan begins anew",
        "kernels/scan/gpu.py",
        "    before_a, before_b = _join(before_a, before_b, end_a, end_b, OP)\n",
        "    before_a, before_b = end_a, end_b\n",
        "what lies two blocks before is lost",
        SCAN,
    ),
    Mutant(
        "sources are added from the end",
        "kernels/scatter/gpu.py",
        "        row = SOURCE + tl.load(ORDER + i) * sks",
        "        row = SOURCE + tl.load(ORDER + tl.load(STARTS + s) + tl.load(STARTS + s + 1) - 1 "
        "- i) * sks",
        "the pinned order of the sources",
        ("tests/test_triton_scatter.py",),
    ),
    Mutant(
        "a source is scaled in single precision",
        "kernels/scatter/gpu.py",
        "        acc += tl.load(row + m * skm, mask=m < M, other=0.0).to(tl.float64) * factor",
        "        acc += (tl.load(row + m * skm, mask=m < M, other=0.0).to(tl.float32) "
        "* factor.to(tl.float32)).to(tl.float64)",
        "a rounding more than the CPU's and the reference's",
        ("tests/test_triton_scatter.py",),
    ),
    Mutant(
        "elements behind K are read",
        "kernels/matmul/tiles.py",
        "            in_a = in_m & (rk[None, :] < K - k)",
        "            in_a = in_m",
        "NaN of the next row comes in",
        MATMUL,
    ),
    Mutant(
        "float32 steps follow the schedule",
        "kernels/matmul/gpu.py",
        '    assert not kind.startswith("ieee") or s.bk == PART\n    return s\n',
        '    if kind.startswith("ieee") and a.shape[1] < 4:\n'
        "        from dataclasses import replace\n\n"
        "        s = replace(s, bk=16)\n    return s\n",
        "few rows have chains of another length",
        MATMUL,
    ),
    Mutant(
        "the product is not rounded before it is added",
        "kernels/matmul/tiles.py",
        "        y = y.to(TYPE).to(tl.float32) + _added(",
        "        y = y + _added(",
        "a fused product has another rounding than the two ops",
        MATMUL,
    ),
    Mutant(
        "silu is not rounded",
        "kernels/matmul/tiles.py",
        "gate = tl.div_rn(gate, exp(-gate) + 1.0).to(TYPE).to(tl.float32)",
        "gate = tl.div_rn(gate, exp(-gate) + 1.0)",
        "a fused op has another rounding than the ops that it replaces",
        MATMUL,
    ),
    Mutant(
        "the last third of a wide tile is summed apart",
        "kernels/matmul/tiles.py",
        "            rest = tl.dot(x, _block(REST, k, n0 + BN, ALONG_K), rest)",
        "            rest += tl.dot(x, _block(REST, k, n0 + BN, ALONG_K))",
        "some columns of the schedules that have it are not one chain",
        MATMUL,
    ),
    Mutant(
        "a run of rows meets the next matrix",
        "kernels/matmul/gpu.py",
        "    mine = (before <= tile) & (tile < before + tiles)",
        "    mine = (before < tile + 1) & (tile <= before + tiles) & (tiles > 0)",
        "rows of a run are computed by another matrix",
        ("tests/test_triton_mixtures.py",),
    ),
    Mutant(
        "parts of a convolution follow the images",
        "kernels/convolution/gpu.py",
        "    parts = triton.cdiv(k, terms)\n",
        "    terms = terms if batch > 1 else k\n    parts = triton.cdiv(k, terms)\n",
        "one image is summed in one chain, several in parts",
        CONVOLUTION,
    ),
    Mutant(
        "parts of a convolution are added from the end",
        "kernels/convolution/gpu.py",
        "at + s * sxs.to",
        "at + (PARTS - 1 - s) * sxs.to",
        "the order of parts follows whether they are split over programs",
        CONVOLUTION,
    ),
    Mutant(
        "pixels outside of a line are read",
        "kernels/convolution/tiles.py",
        "                inside &= within(i3 + d3, I3)\n",
        "                inside &= within(i3 + d3, I3 + 1)\n",
        "a window at the end of a line meets the next line",
        CONVOLUTION,
    ),
    Mutant(
        "chunks are counted from key 0",
        "kernels/attention/masks.py",
        "    tl.store(i + 3, start if NUMBERED else first, mask=r < ROWS)\n",
        "    tl.store(i + 3, start if NUMBERED else first * 0, mask=r < ROWS)\n",
        "padding on the left moves the bounds of chunks",
        ATTENTION,
    ),
    Mutant(
        "rows that begin elsewhere join the first",
        "kernels/attention/gpu.py",
        "            alike = (start == anchor) | (start == NO_KEY)\n",
        "            alike = start >= anchor\n",
        "chunks of a row are counted from the first key of its neighbours",
        ATTENTION,
    ),
    Mutant(
        "chunks follow the number of queries",
        "kernels/attention/gpu.py",
        "R=use.rows, T=tile, PER=CHUNK // tile,",
        "R=use.rows, T=tile, PER=CHUNK // tile if q_len > 1 else 1,",
        "decoding has another order than the prompt",
        ATTENTION,
    ),
    Mutant(
        "chunks are merged from the end",
        "kernels/attention/tiles.py",
        "        mt, lt, at = merge_run(mt, lt, at, m0, l0, a0, scale, W // 2)\n"
        "        mt, lt, at = merge_run(mt, lt, at, m1, l1, a1, scale, W // 2)\n",
        "        mt, lt, at = merge_run(mt, lt, at, m1, l1, a1, scale, W // 2)\n"
        "        mt, lt, at = merge_run(mt, lt, at, m0, l0, a0, scale, W // 2)\n",
        "the order of chunks follows whether they are split over programs",
        ATTENTION,
    ),
    Mutant(
        "the mask of a tile is not applied",
        "kernels/attention/tiles.py",
        '    return tl.where(vis, s, float("-inf")), vis\n',
        "    return s, vis\n",
        "keys behind the last that a row sees get weight",
        ATTENTION,
    ),
    Mutant(
        "a sum that is not finite is written",
        "kernels/attention/gpu.py",
        "        ok = ok & (tl.max(wild.to(tl.int32), 0) < 1)\n",
        "",
        "NaN in the value of a masked key reaches the row",
        ATTENTION,
    ),
)
