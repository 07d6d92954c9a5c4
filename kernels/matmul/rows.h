// Products of rows: a and b both walked along K in memory (a Linear weight [N, K] as it is).
//
// Each output has one vector of 16 lanes; MR x NR outputs at a time share their loads. Nothing is
// packed or copied, which is the fastest way while M is small.
#ifndef BICOMPILE_MATMUL_ROWS_H
#define BICOMPILE_MATMUL_ROWS_H

#include "arithmetic.h"
#include "output.h"

namespace bic::simd {

#if defined(__AVX512F__)
BIC_INLINE __m512 halves(__m512 a, __m512 b) {  // lanes of 128 bits: a0+a2, a1+a3, b0+b2, b1+b3
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
BIC_INLINE __m512 quarters(__m512 a, __m512 b) {  // a0+a1, a2+a3, b0+b1, b2+b3
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
template <int kFirst, int kSecond>
BIC_INLINE __m512 inside(__m512 a, __m512 b) {  // the same within each 128 bits
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, kFirst), _mm512_shuffle_ps(a, b, kSecond));
}
// The trees of 16 accumulators at once: lane i of the result is the sum of acc[i].
BIC_INLINE f32x16 trees(const f32x16* acc, int n) {
  const auto get = [&](int i) { return i < n ? (__m512)acc[i] : _mm512_setzero_ps(); };
  __m512 q[4];
#pragma GCC unroll 4
  for (int p = 0; p < 4; p++)
    q[p] = quarters(halves(get(p), get(p + 4)), halves(get(p + 8), get(p + 12)));
  const __m512 s = inside<0x44, 0xee>(q[0], q[1]), t = inside<0x44, 0xee>(q[2], q[3]);
  return (f32x16)inside<0x88, 0xdd>(s, t);
}
#else
BIC_INLINE f32x16 trees(const f32x16* acc, int n) {
  float t[W] = {};
  for (int i = 0; i < n; i++) t[i] = tree_sum(acc[i]);
  return load(t);
}
#endif

// The lanes of MR x NR outputs over all K.
template <class P, int MR, int NR>
BIC_INLINE void accumulate(const typename P::Element* a, int64_t lda, const typename P::Element* b,
                           int64_t ldb, int64_t K, f32x16* acc) {
  using T = typename P::Element;
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; i++) acc[i] = zero();
  const auto step = [&](const auto& read) __attribute__((always_inline)) {
    typename P::Vector y[NR];
#pragma GCC unroll 16
    for (int n = 0; n < NR; n++) y[n] = read(b + n * ldb);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const typename P::Vector x = read(a + m * lda);
#pragma GCC unroll 16
      for (int n = 0; n < NR; n++) acc[m * NR + n] = P::mac(acc[m * NR + n], x, y[n]);
    }
  };
  int64_t k = 0;
  for (; k + P::kBlock <= K; k += P::kBlock)
    step([k](const T* p) __attribute__((always_inline)) { return P::read(p + k); });
  if (k < K)
    step([k, K](const T* p) __attribute__((always_inline)) { return P::read(p + k, K - k); });
}
template <class P, int MR, int NR>
__attribute__((noinline)) void accumulate_apart(const typename P::Element* a, int64_t lda,
                                                const typename P::Element* b, int64_t ldb,
                                                int64_t K, f32x16* acc) {
  accumulate<P, MR, NR>(a, lda, b, ldb, K, acc);
}

template <class P, int MR, int NR>
void row_tile(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb,
              int64_t K, const Output<typename P::Element>& out, int64_t m0, int64_t n0) {
  f32x16 acc[MR * NR];
  if constexpr (P::kFlush) {
    FloatMode mode(true);
    accumulate_apart<P, MR, NR>(a, lda, b, ldb, K, acc);
  } else {
    accumulate<P, MR, NR>(a, lda, b, ldb, K, acc);
  }
  float tile[(MR * NR + W - 1) / W * W + W];
#pragma GCC unroll 4
  for (int i = 0; i < MR * NR; i += W)
    store_raw(tile + i, trees(acc + i, MR * NR - i < W ? MR * NR - i : W));
  for (int m = 0; m < MR; m++) out.put(m0 + m, n0, load(tile + m * NR), NR);
}

template <class P, int MR, int NR>
void row_tiles(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb,
               int64_t K, const Output<typename P::Element>& out, int64_t m, int64_t n,
               int64_t n1) {
  a += m * lda;
  for (; n + NR <= n1; n += NR) row_tile<P, MR, NR>(a, lda, b + n * ldb, ldb, K, out, m, n);
  for (; n < n1; n++) row_tile<P, MR, 1>(a, lda, b + n * ldb, ldb, K, out, m, n);
}

#if defined(__AVX512F__)
constexpr int kRowM = 4, kRowN = 6, kVectorN = 8;
#else
constexpr int kRowM = 2, kRowN = 3, kVectorN = 4;
#endif

// Columns [n0, n1) of all rows.
template <class P>
void by_rows(const typename P::Element* a, int64_t lda, const typename P::Element* b, int64_t ldb,
             int64_t M, int64_t K, const Output<typename P::Element>& out, int64_t n0, int64_t n1) {
  if (M == 1) return row_tiles<P, 1, kVectorN>(a, lda, b, ldb, K, out, 0, n0, n1);
  // A strip of b that stays in the nearest cache while all rows of a pass over it.
  for (int64_t n = n0; n < n1; n += kRowN) {
    const int64_t stop = n + kRowN < n1 ? n + kRowN : n1;
    int64_t m = 0;
    for (; m + kRowM <= M; m += kRowM)
      row_tiles<P, kRowM, kRowN>(a, lda, b, ldb, K, out, m, n, stop);
    const int64_t rest = M - m;
    if (rest == 1) row_tiles<P, 1, kRowN>(a, lda, b, ldb, K, out, m, n, stop);
    if constexpr (kRowM > 2) {
      if (rest == 2) row_tiles<P, 2, kRowN>(a, lda, b, ldb, K, out, m, n, stop);
      if (rest == 3) row_tiles<P, 3, kRowN>(a, lda, b, ldb, K, out, m, n, stop);
    }
  }
}

}  // namespace bic::simd

#endif
