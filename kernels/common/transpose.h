// A 16 x 16 block of 32-bit words, turned in registers.
#ifndef BICOMPILE_TRANSPOSE_H
#define BICOMPILE_TRANSPOSE_H

#include "lanes.h"

namespace bic::simd {

// Turns 16 rows of 16 words.
BIC_INLINE void transpose(i32x16* r) {
#if defined(__AVX512F__)
  __m512i t[W], u[W];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)r[2 * i], (__m512i)r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = (i32x16)_mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = (i32x16)_mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = (i32x16)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = (i32x16)_mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
#else
  int32_t in[W][W], out[W][W];
  for (int i = 0; i < W; i++) store_words(in[i], r[i]);
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) out[j][i] = in[i][j];
  for (int i = 0; i < W; i++) r[i] = load_words(out[i]);
#endif
}

}  // namespace bic::simd

#endif
