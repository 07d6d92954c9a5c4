// Products by panels: a and b packed so that a vector holds 16 neighbouring columns of one lane.
//
// The 16 lanes of an output are computed in pairs, each for MR x (16 NV) outputs, and met in the
// order of the tree: 0 8, 4 12, 2 10, 6 14, 1 9, 5 13, 3 11, 7 15 is the tree read from its leaves.
// No shuffle is needed, so this wins where packing pays: many rows, or b not walked along K.
//
// A panel of `width` words a step is [pair of lanes][step][2][width].
#ifndef BICOMPILE_MATMUL_PANELS_H
#define BICOMPILE_MATMUL_PANELS_H

#include <algorithm>

#include "../common/transpose.h"
#include "arithmetic.h"
#include "output.h"

namespace bic::simd {

constexpr int kLaneOrder[W] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

#if defined(__AVX512F__)
constexpr int kPanelM = 4, kPanelN = 3;
#else
constexpr int kPanelM = 2, kPanelN = 1;
#endif

template <class P>
int64_t steps_of(int64_t K) { return (K + P::kBlock - 1) / P::kBlock; }

// Words from one pair of lanes to the next, and of a whole panel; the odd line keeps pairs out of
// each other's cache sets.
inline int64_t pair_stride(int64_t steps, int64_t width) { return 2 * steps * width + 16; }
inline int64_t panel_size(int64_t steps, int64_t width) {
  return W / 2 * pair_stride(steps, width);
}

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

// The 16 lanes of up to 16 rows (K contiguous) at one step: r[i] is lane kLaneOrder[i] of all rows.
template <class P>
BIC_INLINE void turn_rows(const typename P::Element* p, int64_t ld, int64_t rows, int64_t k,
                          int64_t K, i32x16* r) {
  i32x16 t[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) t[i] = i < rows ? words(p + i * ld, k, K) : splat_int(0);
  transpose(t);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) r[i] = t[kLaneOrder[i]];
}

// Packs 16 rows of b's transpose, or fewer, as 16 columns of a panel.
template <class P>
void pack_b_rows(const typename P::Element* p, int64_t ld, int64_t rows, int64_t K, int64_t width,
                 Word* out) {
  const int64_t steps = steps_of<P>(K), stride = pair_stride(steps, width);
  for (int64_t s = 0; s < steps; s++) {
    i32x16 r[W];
    turn_rows<P>(p, ld, rows, s * P::kBlock, K, r);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      store_words(out + i / 2 * stride + (2 * s + i % 2) * width, r[i]);
  }
}

// The rows of the block of a that starts at row m: kPanelM, or the largest power of two that fits.
inline int64_t block_rows(int64_t m, int64_t M) {
  int64_t rows = kPanelM;
  while (rows > M - m) rows /= 2;
  return rows;
}

// Words [m, m + n) of v.
BIC_INLINE void store_words(Word* p, i32x16 v, int64_t m, int64_t n) {
  Word t[W];
  store_words(t, v);
  std::memcpy(p, t + m, n * sizeof(Word));
}
#if defined(__AVX512F__)
// 16 rows as four blocks `block` words apart.
BIC_INLINE void store_blocks(Word* p, i32x16 v, int64_t block) {
  const __m512i x = (__m512i)v;
  _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(x));
  _mm_storeu_si128((__m128i*)(p + block), _mm512_extracti32x4_epi32(x, 1));
  _mm_storeu_si128((__m128i*)(p + 2 * block), _mm512_extracti32x4_epi32(x, 2));
  _mm_storeu_si128((__m128i*)(p + 3 * block), _mm512_extracti32x4_epi32(x, 3));
}
#else
BIC_INLINE void store_blocks(Word* p, i32x16 v, int64_t block) {
  for (int64_t m = 0; m < W; m += kPanelM, p += block) store_words(p, v, m, kPanelM);
}
#endif

// What 16 columns of b, walked along N, give to a lane at a step, or rows of a, walked along M:
// zeros beyond K.
template <class P>
BIC_INLINE i32x16 column_words(const typename P::Element* p, int64_t ld, int64_t step,
                               int64_t lane, int64_t K, int64_t columns) {
  const auto row = [&](int64_t k) __attribute__((always_inline)) {
    if (k >= K) return splat_int(0);
    return as_int(columns == W ? load(p + k * ld) : load(p + k * ld, columns));
  };
  if constexpr (P::kBlock == 16) {
    return row(step * W + lane);
  } else {
    const int64_t k = step * 2 * W + 2 * lane;
    return row(k + 1) | shift_right_16(row(k));
  }
}

// Packs up to 16 rows of a as blocks of kPanelM, the last ones smaller, each block a panel;
// `turned` gives a step as `turn_rows` does.
template <class P, class TURNED>
void pack_blocks(int64_t rows, int64_t K, Word* out, const TURNED& turned) {
  const int64_t steps = steps_of<P>(K), whole = panel_size(steps, kPanelM);
  for (int64_t s = 0; s < steps; s++) {
    i32x16 r[W];
    turned(s, r);
    if (rows == W) {
      Word* to = out + 2 * s * kPanelM;
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        store_blocks(to + i / 2 * pair_stride(steps, kPanelM) + i % 2 * kPanelM, r[i], whole);
      continue;
    }
    Word* block = out;
    for (int64_t m = 0; m < rows;) {
      const int64_t n = block_rows(m, rows), stride = pair_stride(steps, n);
      for (int i = 0; i < W; i++)
        store_words(block + i / 2 * stride + (2 * s + i % 2) * n, r[i], m, n);
      block += panel_size(steps, n);
      m += n;
    }
  }
}

// Rows that lie along K.
template <class P>
void pack_a(const typename P::Element* p, int64_t ld, int64_t rows, int64_t K, Word* out) {
  pack_blocks<P>(rows, K, out, [&](int64_t s, i32x16* r) {
    turn_rows<P>(p, ld, rows, s * P::kBlock, K, r);
  });
}

// Rows whose elements of one k are neighbours: no turning is needed.
template <class P>
void pack_a_columns(const typename P::Element* p, int64_t ld, int64_t rows, int64_t K, Word* out) {
  pack_blocks<P>(rows, K, out, [&](int64_t s, i32x16* r) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) r[i] = column_words<P>(p, ld, s, kLaneOrder[i], K, rows);
  });
}

// Packs columns of b, walked along N, as a whole panel: no turning is needed.
template <class P>
void pack_b_columns(const typename P::Element* p, int64_t ld, int64_t columns, int64_t K,
                    int64_t width, Word* out) {
  const int64_t steps = steps_of<P>(K), stride = pair_stride(steps, width);
  for (int64_t s = 0; s < steps; s++)
    for (int i = 0; i < W; i++) {
      Word* to = out + i / 2 * stride + (2 * s + i % 2) * width;
      for (int64_t n = 0; n < width; n += W) {
        const int64_t count = std::clamp<int64_t>(columns - n, 0, W);
        const i32x16 v = column_words<P>(p + n, ld, s, kLaneOrder[i], K, count);
        store_words(to + n, v);
      }
    }
}

// A pair of lanes of MR x (16 NV) outputs: acc[lane][row][vector].
template <class P, int MR, int NV>
BIC_INLINE void chains(const Word* a, const Word* b, int64_t steps, f32x16* acc) {
#pragma GCC unroll 32
  for (int i = 0; i < 2 * MR * NV; i++) acc[i] = zero();
  for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 2
    for (int lane = 0; lane < 2; lane++, a += MR, b += NV * W) {
      typename P::Vector y[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) y[v] = P::from_words(load_words(b + v * W));
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const typename P::Vector x = P::broadcast(a + m);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
          f32x16& sum = acc[(lane * MR + m) * NV + v];
          sum = P::mac(sum, x, y[v]);
        }
      }
    }
  }
}
template <class P, int MR, int NV>
__attribute__((noinline)) void chains_apart(const Word* a, const Word* b, int64_t steps,
                                            f32x16* acc) {
  chains<P, MR, NV>(a, b, steps, acc);
}

// MR rows of a packed block times a panel, to tile[MR][16 NV]; lanes meet as in the tree.
template <class P, int MR, int NV>
__attribute__((noinline)) void panel_tile(const Word* a, const Word* b, int64_t steps,
                                          float* tile) {
  constexpr int kTile = MR * NV;
  const int64_t stride_a = pair_stride(steps, MR), stride_b = pair_stride(steps, NV * W);
  f32x16 waiting[3][kTile], acc[2 * kTile];
  for (int pair = 0; pair < W / 2; pair++) {
    if constexpr (P::kFlush) {
      FloatMode mode(true);
      chains_apart<P, MR, NV>(a + pair * stride_a, b + pair * stride_b, steps, acc);
    } else {
      chains<P, MR, NV>(a + pair * stride_a, b + pair * stride_b, steps, acc);
    }
#pragma GCC unroll 32
    for (int j = 0; j < kTile; j++) acc[j] = acc[j] + acc[kTile + j];
    int depth = __builtin_popcount(pair);  // how many partial sums wait
    for (int full = pair; full & 1; full >>= 1) {
      depth--;
#pragma GCC unroll 32
      for (int j = 0; j < kTile; j++) acc[j] = waiting[depth][j] + acc[j];
    }
    if (pair < W / 2 - 1)
#pragma GCC unroll 32
      for (int j = 0; j < kTile; j++) waiting[depth][j] = acc[j];
  }
#pragma GCC unroll 32
  for (int j = 0; j < kTile; j++) store_raw(tile + j * W, acc[j]);
}

// Vectors in the panel that starts at vector v of n: kPanelN, but no panel of one after one of 3.
inline int64_t panel_vectors(int64_t v, int64_t n) {
  const int64_t left = n - v;
  return kPanelN == 3 && (left == 4 || left == 2) ? 2 : left < kPanelN ? left : kPanelN;
}

// The block of rows at m, of at most M, times a panel of NV vectors, to tile[rows][NV][16];
// returns how many rows it has.
template <class P, int NV>
int64_t panel_block(const Word* a, const Word* b, int64_t m, int64_t M, int64_t steps,
                    float* tile) {
  const int64_t rows = block_rows(m, M);
  if (rows == 4) {
    if constexpr (kPanelM == 4) panel_tile<P, 4, NV>(a, b, steps, tile);
  } else if (rows == 2) {
    panel_tile<P, 2, NV>(a, b, steps, tile);
  } else {
    panel_tile<P, 1, NV>(a, b, steps, tile);
  }
  return rows;
}

// Rows [m, M) of packed blocks times a panel of NV vectors whose first column is n.
template <class P, class T, int NV>
void panel_blocks(const Word* a, const Word* b, int64_t m, int64_t M, int64_t K, int64_t n,
                  int64_t N, const Output<T>& out) {
  const int64_t steps = steps_of<P>(K);
  alignas(64) float tile[kPanelM * NV * W];
  for (int64_t rows; m < M; m += rows, a += panel_size(steps, rows)) {
    rows = panel_block<P, NV>(a, b, m, M, steps, tile);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t v = 0; v < NV && n + v * W < N; v++)
        out.put(m + i, n + v * W, load(tile + (i * NV + v) * W), std::min(W, N - n - v * W));
  }
}

}  // namespace bic::simd

#endif
