// Products by panels: a and b packed so that a vector holds 16 neighbouring columns of one lane.
//
// The 16 lanes of an output are computed one after another, each for MR x (16 NV) outputs, and met
// in the order of the tree: 0 8 4 12 2 10 6 14 1 9 5 13 3 11 7 15 is the tree read from its leaves.
// No shuffle is needed, so this wins where packing pays: many rows, or b not walked along K.
#ifndef BICOMPILE_MATMUL_PANELS_H
#define BICOMPILE_MATMUL_PANELS_H

#include "../common/transpose.h"
#include "arithmetic.h"
#include "output.h"

namespace bic::simd {

constexpr int kLaneOrder[W] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

#if defined(__AVX512F__)
constexpr int kPanelM = 8, kPanelN = 3;
#else
constexpr int kPanelM = 4, kPanelN = 1;
#endif

// Words between two lanes of a panel of `width` words a step; the odd line keeps lanes out of each
// other's cache sets.
inline int64_t lane_stride(int64_t steps, int64_t width) { return steps * width + 16; }

// 16 words of one row from element k on: elements at K and beyond are 0.
template <class T>
BIC_INLINE i32x16 words(const T* row, int64_t k, int64_t K) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, bf16>) {
    if (k + 32 <= K) return load_words(row + k);
    bf16 buffer[32] = {};
    std::memcpy(buffer, row + k, (K - k) * sizeof(bf16));
    return load_words(buffer);
  } else {
    return as_int(k + W <= K ? load(row + k) : load(row + k, K - k));
  }
}

// Packs rows (K contiguous) as [lane][step][width], `at` words into a step, 16 rows or fewer.
template <class P>
void pack_rows(const typename P::Element* p, int64_t ld, int64_t rows, int64_t K, int64_t width,
               int64_t at, int64_t used, Word* out) {
  const int64_t steps = (K + P::kBlock - 1) / P::kBlock, stride = lane_stride(steps, width);
  for (int64_t s = 0; s < steps; s++) {
    i32x16 r[W];
    for (int64_t i = 0; i < W; i++)
      r[i] = i < rows ? words(p + i * ld, s * P::kBlock, K) : splat_int(0);
    transpose(r);
    for (int i = 0; i < W; i++)
      std::memcpy(out + i * stride + s * width + at, &r[kLaneOrder[i]], used * sizeof(Word));
  }
}

// Packs columns of a matrix with contiguous columns, [K, N] in memory: no turning is needed.
template <class P>
void pack_columns(const typename P::Element* p, int64_t ld, int64_t columns, int64_t K,
                  int64_t width, int64_t at, Word* out) {
  const int64_t steps = (K + P::kBlock - 1) / P::kBlock, stride = lane_stride(steps, width);
  const auto row = [&](int64_t k) {
    if (k >= K) return zero();
    return columns == W ? load(p + k * ld) : load(p + k * ld, columns);
  };
  for (int64_t s = 0; s < steps; s++) {
    for (int i = 0; i < W; i++) {
      i32x16 v;
      if constexpr (P::kBlock == 32) {
        const int64_t k = s * 32 + 2 * kLaneOrder[i];
        v = as_int(row(k + 1)) | shift_right_16(as_int(row(k)));
      } else {
        v = as_int(row(s * W + kLaneOrder[i]));
      }
      std::memcpy(out + i * stride + s * width + at, &v, sizeof(v));
    }
  }
}

// One lane of MR x (16 NV) outputs.
template <class P, int MR, int NV>
BIC_INLINE void chain(const Word* a, const Word* b, int64_t steps, f32x16* acc) {
#pragma GCC unroll 32
  for (int i = 0; i < MR * NV; i++) acc[i] = zero();
  for (int64_t s = 0; s < steps; s++, a += MR, b += NV * W) {
    typename P::Vector y[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) y[v] = P::unpack(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const typename P::Vector x = P::broadcast(a + m);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m * NV + v] = P::mac(acc[m * NV + v], x, y[v]);
    }
  }
}
template <class P, int MR, int NV>
__attribute__((noinline)) void chain_apart(const Word* a, const Word* b, int64_t steps, f32x16* acc) {
  chain<P, MR, NV>(a, b, steps, acc);
}

template <class P, int MR, int NV>
__attribute__((noinline)) void panel_tile(const Word* a, const Word* b, int64_t K,
                                          const Output<typename P::Element>& out, int64_t m0,
                                          int64_t n0, int64_t n1) {
  const int64_t steps = (K + P::kBlock - 1) / P::kBlock;
  const int64_t stride_a = lane_stride(steps, MR), stride_b = lane_stride(steps, NV * W);
  f32x16 partial[4][MR * NV], acc[MR * NV];
  for (int i = 0; i < W; i++) {
    if constexpr (P::kFlush) {
      FloatMode mode(true);
      chain_apart<P, MR, NV>(a + i * stride_a, b + i * stride_b, steps, acc);
    } else {
      chain<P, MR, NV>(a + i * stride_a, b + i * stride_b, steps, acc);
    }
    int depth = __builtin_popcount(i);  // partial sums that wait
    for (int full = i; full & 1; full >>= 1) {
      depth--;
#pragma GCC unroll 32
      for (int j = 0; j < MR * NV; j++) acc[j] = partial[depth][j] + acc[j];
    }
    if (i < W - 1)
#pragma GCC unroll 32
      for (int j = 0; j < MR * NV; j++) partial[depth][j] = acc[j];
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const int64_t n = n0 + v * W;
      if (n < n1) out.put(m0 + m, n, acc[m * NV + v], n1 - n < W ? n1 - n : W);
    }
}

// The rows of the block of a that starts at row m: kPanelM, or the largest power of two that fits.
inline int64_t block_rows(int64_t m, int64_t M) {
  int64_t rows = kPanelM;
  while (rows > M - m) rows /= 2;
  return rows;
}
// Vectors in the panel that starts at vector v of n: kPanelN, but no panel of one after one of 3.
inline int64_t panel_vectors(int64_t v, int64_t n) {
  const int64_t left = n - v;
  return kPanelN == 3 && (left == 4 || left == 2) ? 2 : left < kPanelN ? left : kPanelN;
}

template <class P, int NV>
void panel_blocks(const Word* a, const Word* b, int64_t m, int64_t M, int64_t K,
                  const Output<typename P::Element>& out, int64_t n0, int64_t n1) {
  const int64_t steps = (K + P::kBlock - 1) / P::kBlock;
  while (m < M) {
    const int64_t rows = block_rows(m, M);
    if (rows == 8) {
      if constexpr (kPanelM == 8) panel_tile<P, 8, NV>(a, b, K, out, m, n0, n1);
    } else if (rows == 4) {
      panel_tile<P, 4, NV>(a, b, K, out, m, n0, n1);
    } else if (rows == 2) {
      panel_tile<P, 2, NV>(a, b, K, out, m, n0, n1);
    } else {
      panel_tile<P, 1, NV>(a, b, K, out, m, n0, n1);
    }
    a += W * lane_stride(steps, rows);
    m += rows;
  }
}

}  // namespace bic::simd

#endif
