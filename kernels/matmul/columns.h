// Products of columns: few rows of a, and b walked along N as it lies in memory ([K, N] row-major).
//
// A vector holds 16 neighbouring columns of one lane, as in panels.h, but b is not packed: a block
// of columns keeps its 16 lanes of partial sums in the nearest cache while b passes by once.
#ifndef BICOMPILE_MATMUL_COLUMNS_H
#define BICOMPILE_MATMUL_COLUMNS_H

#include <algorithm>

#include "arithmetic.h"
#include "output.h"
#include "panels.h"

namespace bic::simd {

constexpr int kColumnVectors = 8;  // of a block
constexpr int kColumnM = 4;        // rows that share the loads of b

// Rows of a as words, zeros beyond K: word 16 s + l is what lane l takes at step s.
template <class P>
void pack_words(const typename P::Element* a, int64_t lda, int64_t M, int64_t K, Word* out) {
  const int64_t steps = steps_of<P>(K);
  for (int64_t m = 0; m < M; m++)
    for (int64_t s = 0; s < steps; s++, out += W) {
      const i32x16 v = words(a + m * lda, s * P::kBlock, K);
      store_words(out, v);
    }
}

// acc[lane][vector][row] += the lanes of MR rows over columns [0, n) of b.
template <class P, int MR>
__attribute__((noinline)) void accumulate_columns(const Word* a, const typename P::Element* b,
                                                  int64_t ldb, int64_t K, int64_t n, f32x16* acc) {
  using Panel = typename P::Panel;
  constexpr int64_t kSteps = 8;  // of one lane between a load and a store of its sums
  const int64_t steps = steps_of<P>(K), vectors = (n + W - 1) / W;
  for (int64_t s0 = 0; s0 < steps; s0 += kSteps) {
    const int64_t s1 = std::min(steps, s0 + kSteps);
    for (int64_t lane = 0; lane < W; lane++)
      for (int64_t v = 0; v < vectors; v++) {
        const int64_t count = std::min(W, n - v * W);
        f32x16* to = acc + (lane * kColumnVectors + v) * MR;
        f32x16 sum[MR];
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) sum[m] = to[m];
        for (int64_t s = s0; s < s1; s++) {
          const auto y = Panel::from_words(column_words<P>(b + v * W, ldb, s, lane, K, count));
#pragma GCC unroll 4
          for (int m = 0; m < MR; m++)
            sum[m] = Panel::mac(sum[m], Panel::broadcast(a + m * steps * W + s * W + lane), y);
        }
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) to[m] = sum[m];
      }
  }
}

template <class P, int MR>
void column_block(const Word* a, const typename P::Element* b, int64_t ldb, int64_t K, int64_t n,
                  int64_t m0, int64_t n0, const Output<typename P::Element>& out) {
  f32x16 acc[W][kColumnVectors][MR];
  for (auto& lane : acc)
    for (auto& vector : lane)
      for (auto& sum : vector) sum = zero();
  {
    FloatMode mode(P::Panel::kFlush);
    accumulate_columns<P, MR>(a, b, ldb, K, n, &acc[0][0][0]);
  }
  for (int64_t v = 0; v * W < n; v++)
    for (int m = 0; m < MR; m++) {
      for (int w = 8; w > 0; w /= 2)
        for (int i = 0; i < w; i++) acc[i][v][m] = acc[i][v][m] + acc[i + w][v][m];
      out.put(m0 + m, n0 + v * W, acc[0][v][m], std::min(W, n - v * W));
    }
}

// Columns [n0, n1), at most a block, of all rows; a as packed by pack_words.
template <class P>
void by_columns(const Word* a, const typename P::Element* b, int64_t ldb, int64_t M, int64_t K,
                int64_t n0, int64_t n1, const Output<typename P::Element>& out) {
  const int64_t row = steps_of<P>(K) * W;
  int64_t m = 0;
  for (; m + kColumnM <= M; m += kColumnM)
    column_block<P, kColumnM>(a + m * row, b + n0, ldb, K, n1 - n0, m, n0, out);
  if (m + 2 <= M) {
    column_block<P, 2>(a + m * row, b + n0, ldb, K, n1 - n0, m, n0, out);
    m += 2;
  }
  if (m < M) column_block<P, 1>(a + m * row, b + n0, ldb, K, n1 - n0, m, n0, out);
}

}  // namespace bic::simd

#endif
