"""Faults in the C++ kernels of products, reductions, softmax and norms."""

from __future__ import annotations

from .mutant import Mutant, laws

MATMUL = laws("mm or swiglu or qkv")
NATIVE = ("tests/test_native.py",)
REDUCE = laws("sum-cpu or sum- or mean or var or std or prod or norm- or logsumexp")

MUTANTS = (
    # --------------------------------------------------------------- matrix products
    Mutant(
        "lanes meet in another order in a panel",
        "kernels/matmul/panels.h",
        "{0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15}",
        "{0, 4, 8, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15}",
        "many rows are summed in another order than few",
        NATIVE,
    ),
    Mutant(
        "the tree of a block of columns joins neighbours",
        "kernels/matmul/columns.h",
        "      for (int w = 8; w > 0; w /= 2)\n        for (int i = 0; i < w; i++) acc[i][v][m]",
        "      for (int w = 1; w < W; w *= 2)\n"
        "        for (int i = 0; i < W; i += 2 * w) acc[i][v][m]",
        "few rows are summed in another order than many",
        MATMUL,
    ),
    Mutant(
        "a partial sum for every eight steps",
        "kernels/matmul/columns.h",
        "        for (int m = 0; m < MR; m++) sum[m] = to[m];",
        "        for (int m = 0; m < MR; m++) sum[m] = zero();",
        "sums begin anew with each block of K: the block before is lost",
        MATMUL,
    ),
    Mutant(
        "partial sums of a tile are added to its result",
        "kernels/matmul/columns.h",
        "        for (int m = 0; m < MR; m++) to[m] = sum[m];",
        "        for (int m = 0; m < MR; m++) to[m] = s0 ? (sum[m] - to[m]) + to[m] : sum[m];",
        "the sum of a tile of K is rounded apart: the order follows the tile",
        MATMUL,
    ),
    Mutant(
        "the end of K comes first for rows",
        "kernels/matmul/rows.h",
        "  int64_t k = 0;\n  for (; k + P::kBlock <= K; k += P::kBlock)",
        "  int64_t k = K % P::kBlock;\n"
        "  if (k) step([k](const T* p) __attribute__((always_inline)) { return P::read(p, k); });\n"
        "  for (; k + P::kBlock <= K; k += P::kBlock)",
        "a weight walked along K gives other bits than its copy walked along N",
        MATMUL,
    ),
    Mutant(
        "one row is computed without fma",
        "kernels/matmul/rows.h",
        "for (int n = 0; n < NR; n++) acc[m * NR + n] = P::mac(acc[m * NR + n], x, y[n]);",
        "for (int n = 0; n < NR; n++) {\n"
        "        if constexpr (MR == 1 && P::kBlock == 16)\n"
        "          acc[m * NR + n] = acc[m * NR + n] + x * y[n];\n"
        "        else acc[m * NR + n] = P::mac(acc[m * NR + n], x, y[n]);\n"
        "      }",
        "a row alone has another rounding than in a batch",
        MATMUL,
    ),
    Mutant(
        "the last column is summed by another tree",
        "kernels/matmul/rows.h",
        "q[p] = quarters(halves(get(p), get(p + 4)), halves(get(p + 8), get(p + 12)));",
        "q[p] = n == 1 ? _mm512_add_ps(quarters(get(p), get(p + 4)), quarters(get(p + 8), "
        "get(p + 12))) : quarters(halves(get(p), get(p + 4)), halves(get(p + 8), get(p + 12)));",
        "a column that stands alone at the end has other sums (AVX-512)",
        MATMUL,
    ),
    Mutant(
        "rows of a transposed left side are packed in the order of memory",
        "kernels/matmul/panels.h",
        "r[i] = column_words<P>(p, ld, s, kLaneOrder[i], K, rows);",
        "r[i] = column_words<P>(p, ld, s, i, K, rows);",
        "gradients of weights pair terms of different places",
        (*NATIVE, "-k", "left_side"),
    ),
    Mutant(
        "elements behind K are read",
        "kernels/matmul/panels.h",
        "return as_int(k + W <= K ? load(row + k) : load(row + k, K - k));",
        "return as_int(load(row + k));",
        "the mask of the last block of K is lost: a neighbour's NaN comes in",
        MATMUL,
    ),
    Mutant(
        "float32 products without fma",
        "kernels/matmul/arithmetic.h",
        "{ return fma(a, b, acc); }",
        "{ return a * b + acc; }",
        "the pinned rounding of a step",
        NATIVE,
    ),
    Mutant(
        "the product is not rounded before it is added",
        "kernels/matmul/output.h",
        "    if (round_first) v = rounded(v, T{});\n",
        "",
        "a fused product has another rounding than the two ops",
        ("tests/test_fuse_matmul.py",),
    ),
    Mutant(
        "beta is a step of an fma",
        "kernels/matmul/output.h",
        "      if (beta != 1.f) s = splat(beta) * s;\n      v = v + s;",
        "      v = fma(splat(beta), s, v);",
        "alpha * acc + beta * self has one rounding less",
        ("tests/test_values.py", "-k", "addmm"),
    ),
    Mutant(
        "a strided bias is rounded",
        "kernels/matmul/output.h",
        "for (int64_t i = 0; i < count; i++) t[i] = to_float(p[i * stride_n]);",
        "for (int64_t i = 0; i < count; i++) t[i] = to_float(from_float<bf16>(to_float("
        "p[i * stride_n])));",
        "bits follow the strides of the bias",
        MATMUL,
    ),
    Mutant(
        "rows behind the last group stay as they are",
        "kernels/matmul/cpu.cpp",
        "(M - begin) * N * sizeof(T));",
        "0 * (M - begin) * N * sizeof(T));",
        "elements that nobody writes",
        (*MATMUL, "tests/test_mixtures.py", "-k", "grouped_mm or row or runs"),
    ),
    Mutant(
        "a group ends with the rows of the batch",
        "kernels/matmul/cpu.cpp",
        "std::clamp((int64_t)ends[g], begin, M);",
        "g + 1 < groups ? std::clamp((int64_t)ends[g], begin, M) : M;",
        "rows behind the last run are computed by its matrix",
        laws("grouped_mm"),
    ),
    Mutant(
        "silu is not rounded",
        "kernels/matmul/cpu.cpp",
        "const f32x16 silu = rounded(v / (splat(1.f) + bic::exp(zero() - v)), T{});",
        "const f32x16 silu = v / (splat(1.f) + bic::exp(zero() - v));",
        "a fused op has another rounding than the ops that it replaces",
        ("tests/test_fuse_matmul.py",),
    ),
    # --------------------------------------------------------------- reductions
    Mutant(
        "elements behind the end of a row enter the sum",
        "kernels/reduce/cpu.cpp",
        "if (k < K) acc = first(K - k, op.step(acc, load(p + k, K - k)), acc);",
        "if (k < K) acc = op.step(acc, load(p + k, K - k));",
        "the mask of the last block is lost",
        REDUCE,
    ),
    Mutant(
        "side by side, lanes join their neighbours",
        "kernels/reduce/cpu.cpp",
        "    for (int w = 8; w > 0; w /= 2)\n      for (int i = 0; i < w; i++) acc[i] =",
        "    for (int w = 1; w < W; w *= 2)\n      for (int i = 0; i < W; i += 2 * w) acc[i] =",
        "columns are summed in another order than rows: bits follow the strides",
        REDUCE,
    ),
    Mutant(
        "side by side, a lane runs backwards",
        "kernels/reduce/cpu.cpp",
        "for (int64_t k = l; k < K; k += W) acc[l] = op.step(acc[l], load(p + k * W));",
        "for (int64_t k = l + (K - 1 - l + W) / W * W - W; k >= l; k -= W)\n"
        "        acc[l] = op.step(acc[l], load(p + k * W));",
        "the order of chunks is swapped where outputs are neighbours in memory",
        REDUCE,
    ),
    Mutant(
        "a mean is rounded before it is divided",
        "kernels/reduce/cpu.cpp",
        "return narrow(x.reduce(Sum{}) / wide((double)K)); });",
        "return narrow(x.reduce(Sum{})) / splat((float)K); });",
        "the mean has two roundings; RMSNorm written by hand differs from the fused op",
        ("tests/test_values.py", "-k", "rms_norm"),
    ),
    Mutant(
        "an infinite maximum is subtracted",
        "kernels/reduce/cpu.cpp",
        "const f32x16 finite = select(abs(top) == splat(kInf), zero(), top);",
        "const f32x16 finite = top;",
        "logsumexp of a row of -inf, or with inf, is NaN",
        ("tests/test_values.py",),
    ),
    Mutant(
        "few outputs are summed from both ends",
        "kernels/reduce/cpu.cpp",
        "      for (int64_t i = begin; i < end; i++) f(Row{rows[i], K}, K, i, (int64_t)1);",
        "      for (int64_t i = begin; i < end; i++) {\n"
        "        const Row row{rows[i], K};\n"
        "        if (outputs > 2 || K < 2 * W) f(row, K, i, (int64_t)1);\n"
        "        else {\n"
        "          const Scratch<float> turned(K);\n"
        "          for (int64_t k = 0; k < K; k++) turned[k] = row.p[K - 1 - k];\n"
        "          f(Row{turned, K}, K, i, (int64_t)1);\n"
        "        }\n"
        "      }",
        "the order of a sum follows the number of rows",
        REDUCE,
    ),
    Mutant(
        "the tree of double lanes joins neighbours",
        "kernels/common/wide.h",
        "  for (int w = 8; w > 0; w /= 2)\n    for (int i = 0; i < w; i++) t[i] = op(",
        "  for (int w = 1; w < W; w *= 2)\n    for (int i = 0; i < W; i += 2 * w) t[i] = op(",
        "rows are summed in another order than columns",
        REDUCE,
    ),
    Mutant(
        "axes are merged though their strides differ",
        "kernels/common/tensor.h",
        "if (!size_.empty() && stride_.back() == size * stride) {",
        "if (!size_.empty() && stride_.back() >= size * stride) {",
        "a view is read as if it were dense",
        REDUCE,
    ),
    Mutant(
        "the caller's flushing of subnormals stays on",
        "kernels/common/tensor.h",
        "    FloatMode mode;\n",
        "",
        "bits follow the floating-point mode of the thread",
        NATIVE,
    ),
    # --------------------------------------------------------------- softmax and norms
    Mutant(
        "lanes behind the end of a row enter the sum of exponentials",
        "kernels/softmax/cpu.cpp",
        "acc = acc + wide(select(first(K - k), v, zero()));",
        "acc = acc + wide(v);",
        "the mask of the last block is lost",
        laws("softmax"),
    ),
    Mutant(
        "the maximum leaves out the end of a row",
        "kernels/softmax/cpu.cpp",
        "  if (k < K) m0 = select(first(K - k), max_or_skip(load(x + k, K - k), m0), m0);\n",
        "",
        "exp overflows where the largest element comes last",
        ("tests/test_values.py",),
    ),
    Mutant(
        "statistics in one pass",
        "kernels/norm/cpu.cpp",
        "    const f64x16 d = wide(v) - centre;\n    return acc + d * d;\n  });\n  return {mean, "
        "1.0 / std::sqrt(squares / K + eps)};",
        "    return acc + wide(v * v);\n  });\n"
        "  return {mean, 1.0 / std::sqrt(squares / K - mean * mean + eps)};",
        "the variance of a row far from zero cancels",
        ("tests/test_values.py",),
    ),
    Mutant(
        "the mean of squares is not rounded",
        "kernels/norm/rows.h",
        "  const float mean = (float)(sum / K);\n"
        "  const f32x16 r = splat(1.f / std::sqrt(mean + eps))",
        "  const double mean = sum / K;\n"
        "  const f32x16 r = splat((float)(1.0 / std::sqrt(mean + eps)))",
        "the fused RMSNorm has other roundings than the chain that it replaces",
        ("tests/test_fuse_norm.py", "-k", "fused"),
    ),
    Mutant(
        "a weight is multiplied before the rounding",
        "kernels/norm/rows.h",
        "y = round_first ? rounded(y, T{})",
        "y = round_first ? y",
        "the fused RMSNorm has other roundings than the chain that it replaces",
        ("tests/test_fuse_norm.py", "-k", "fused"),
    ),
    Mutant(
        "a group's weights are those of the first",
        "kernels/norm/cpu.cpp",
        "const int64_t c = i % groups * channels;",
        "const int64_t c = i / N % groups * channels;",
        "the channel of a group follows the batch",
        laws("group_norm"),
    ),
    Mutant(
        "half of a rotation is not rounded",
        "kernels/rope/cpu.cpp",
        "const f32x16 b = rounded(load_block(turned + d, count) * load_block(sin + d, count), "
        "T{});",
        "const f32x16 b = load_block(turned + d, count) * load_block(sin + d, count);",
        "the fused rotation has other roundings than the chain that it replaces",
        ("tests/test_fuse_rope.py",),
    ),
    Mutant(
        "every row has the rotation of the first batch entry",
        "kernels/rope/cpu.cpp",
        "return base_ + b * batch_ + s * token_; }",
        "return base_ + s * token_; }",
        "positions of other batch entries are used",
        ("tests/test_fuse_rope.py", "tests/test_kernels.py", "-k", "rope or fuse"),
    ),
)
