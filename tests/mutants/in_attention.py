"""Faults in the C++ kernels of attention, convolution, scans, systems, sums by index, sorting."""

from __future__ import annotations

from .mutant import Mutant

ATTENTION = ("tests/test_attention.py", "tests/test_kernels.py", "-k", "attention or sdpa")
GRADIENTS = ("tests/test_attention_gradients.py",)

MUTANTS = (
    # --------------------------------------------------------------- attention
    Mutant(
        "the weight of a masked key has no sign",
        "kernels/attention/mask.h",
        "constexpr float kMasked = -0.f;",
        "constexpr float kMasked = 0.f;",
        "NaN in the value of a masked key reaches the row",
        ATTENTION,
    ),
    Mutant(
        "the lowest score stands for a masked key",
        "kernels/attention/cpu.cpp",
        "        x = select(in & (add != none), x + add, none);",
        "        x = select(in, max_or_skip(x + add, splat(-1e9f)), none);",
        "a mask of -1e9: a row that sees nothing is not 0, masked keys weigh",
        ATTENTION,
    ),
    Mutant(
        "a query sees one key too many",
        "kernels/attention/cpu.cpp",
        "const int64_t end = causal_ ? std::min(range.end, r.query(i) + 1) : range.end;",
        "const int64_t end = causal_ ? std::min(range.end, r.query(i) + 2) : range.end;",
        "the causal mask is off by one for all but the last query of a task",
        ATTENTION,
    ),
    Mutant(
        "one row's scores are one chain",
        "kernels/attention/products.h",
        "          f32x16& sum = acc[(odd * MR + m) * NV + j];\n          sum = fma(x, k[j], sum);",
        "          f32x16& sum = acc[((MR > 1 ? odd : 0) * MR + m) * NV + j];\n"
        "          sum = fma(x, k[j], sum);",
        "a query alone (decode) has another order than one of many (prefill)",
        ATTENTION,
    ),
    Mutant(
        "one row's values are added without fma",
        "kernels/attention/products.h",
        "for (int j = 0; j < NV; j++) acc[m][j] = fma(w, x[j], acc[m][j]);",
        "for (int j = 0; j < NV; j++)\n"
        "        acc[m][j] = MR == 1 ? acc[m][j] + w * x[j] : fma(w, x[j], acc[m][j]);",
        "the rows that are left over have another rounding",
        ATTENTION,
    ),
    Mutant(
        "values are summed by blocks of 512 keys",
        "kernels/attention/cpu.cpp",
        "      values(p + (k - range.begin), ldp, r.count, values_at(r.b, r.kh) + k * vs_[2], "
        "vs_[2],\n             std::min(kKeys, range.end - k), Dv_, o, Dvp_, l);",
        "    {\n      const Scratch<float> part(r.count * Dvp_);\n"
        "      std::fill_n((float*)part, r.count * Dvp_, 0.f);\n"
        "      values(p + (k - range.begin), ldp, r.count, values_at(r.b, r.kh) + k * vs_[2], "
        "vs_[2],\n             std::min(kKeys, range.end - k), Dv_, part, Dvp_, l);\n"
        "      for (int64_t i = 0; i < r.count * Dvp_; i++) o[i] += part[i];\n    }",
        "chunks counted from the first key that a task sees: long prompts and padding change bits",
        ("tests/test_attention.py", "-k", "long"),
    ),
    Mutant(
        "a row that is not finite is not computed again",
        "kernels/attention/cpu.cpp",
        "      if (!write(o + i * Dvp_, sum, output(r, i)))\n"
        "        careful_row(r, i, range, p + i * ldp, sum, o + i * Dvp_);",
        "      write(o + i * Dvp_, sum, output(r, i));",
        "NaN in the value of a masked key reaches the row",
        ATTENTION,
    ),
    Mutant(
        "heads share the mask of the first",
        "kernels/attention/cpu.cpp",
        "if (mask_.given() && (i % group_ == 0 || mask_.per_head()))",
        "if (mask_.given() && i % group_ == 0)",
        "the mask of another head is applied",
        ATTENTION,
    ),
    Mutant(
        "the gradient of a masked key is added",
        "kernels/attention_backward/cpu.cpp",
        "          if (as_word(w) == as_word(kMasked)) continue;\n",
        "",
        "NaN in a masked key reaches the gradient of a row",
        GRADIENTS,
    ),
    Mutant(
        "rows that are not finite are added whole",
        "kernels/attention_backward/cpu.cpp",
        "if (x.finite) return add_products(",
        "return add_products(",
        "NaN in a masked key reaches the gradient of a row",
        GRADIENTS,
    ),
    # --------------------------------------------------------------- convolution, scans, the others
    Mutant(
        "few outputs are summed in another order",
        "kernels/convolution/direct.h",
        "      Vectors x = tree<LANE, 2 * STEP>(leaf);\n"
        "      if constexpr (LANE + STEP < L) {\n"
        "        const Vectors y = tree<LANE + STEP, 2 * STEP>(leaf);\n",
        "      Vectors x = tree<LANE, 2 * STEP>(leaf);\n"
        "      if constexpr (LANE + STEP < L) {\n"
        "        Vectors y = tree<LANE + STEP, 2 * STEP>(leaf);\n"
        "        if constexpr (L == W && STEP == 1 && LANE == 0) {\n"
        "#pragma GCC unroll 4\n"
        "          for (int v = 0; v < NV; v++) y.v[v] = (y.v[v] + splat(1.f)) - splat(1.f);\n"
        "        }\n",
        "a convolution is no longer the product that it is, few channels differ from many",
        ("tests/test_convolution.py", "tests/test_kernels.py", "-k", "convolution"),
    ),
    Mutant(
        "the end of an image is not laid out",
        "kernels/convolution/slide.h",
        "return {begin, std::max(begin, before(s.size))};",
        "return {begin, std::max(begin, before(s.size - (s.size > 1)))};",
        "the last line of an image is taken for padding",
        ("tests/test_convolution.py", "tests/test_kernels.py", "-k", "convolution"),
    ),
    Mutant(
        "a band of an image lacks its last line",
        "kernels/convolution/depthwise.h",
        "const int64_t end = std::clamp(size - low, begin, rows);",
        "const int64_t end = std::clamp(size - low, begin, rows - (low > 0 && rows > begin));",
        "windows at the end of a band read zeros",
        ("tests/test_convolution.py", "-k", "depthwise"),
    ),
    Mutant(
        "a few rows are scanned in single precision",
        "kernels/scan/cpu.cpp",
        "to[k * y.step] = from_float<T>((float)op.step(to_float(from[k * x.step])));",
        "to[k * y.step] = from_float<T>((float)(op.step(to_float(from[k * x.step])) * "
        "(1.0 + 0x1p-25)));",
        "a row alone has other bits than beside others",
        ("tests/test_scan.py", "tests/test_kernels.py", "-k", "scan or cum"),
    ),
    Mutant(
        "a system of few columns takes off the last found first",
        "kernels/solve/cpu.cpp",
        "    for (int64_t before = 0; before < step; before++) {\n"
        "      const int64_t j = upper ? K - 1 - before : before;\n",
        "    for (int64_t at = 0; at < step; at++) {\n"
        "      const int64_t before = n < 4 ? step - 1 - at : at;\n"
        "      const int64_t j = upper ? K - 1 - before : before;\n",
        "a column alone has other bits than beside others",
        ("tests/test_solve.py", "-k", "order"),
    ),
    Mutant(
        "sources of a narrow row are added from the end",
        "kernels/scatter/cpu.cpp",
        "      for (const int64_t* p = positions; p < end; p++)\n"
        "        acc += factor * to_float(added[*p * stride + m]);",
        "      for (const int64_t* p = end; p-- > positions;)\n"
        "        acc += factor * to_float(added[*p * stride + m]);",
        "the order of a sum follows the width of the rows",
        ("tests/test_scatter.py", "tests/test_kernels.py", "-k", "index_add or scatter"),
    ),
    Mutant(
        "sources are listed from the end",
        "kernels/scatter/cpu.cpp",
        "    for (int64_t k = 0; k < count; k++) positions[",
        "    for (int64_t k = count - 1; k >= 0; k--) positions[",
        "the pinned order of the sources",
        ("tests/test_scatter.py",),
    ),
    Mutant(
        "equal elements are in any order",
        "kernels/sort/cpu.cpp",
        "return key != other.key ? key < other.key : index < other.index;",
        "return key < other.key;",
        "which of equal elements is taken follows the algorithm",
        ("tests/test_sort.py",),
    ),
    Mutant(
        "zeros of both signs differ",
        "kernels/sort/cpu.cpp",
        "const int32_t bits = bit_cast<int32_t>(f), magnitude = bits & 0x7fffffff;\n"
        "    return bits < 0 ? -magnitude : magnitude;",
        "const int32_t bits = bit_cast<int32_t>(f), magnitude = bits & 0x7fffffff;\n"
        "    return bits < 0 ? -magnitude - 1 : magnitude;",
        "-0 is smaller than 0, though equal elements keep their order",
        ("tests/test_sort.py",),
    ),
)
