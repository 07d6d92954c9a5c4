// A 16 x 16 block of 32-bit words, turned in registers.
#ifndef BICOMPILE_TRANSPOSE_H
#define BICOMPILE_TRANSPOSE_H

#include <utility>

#include "lanes.h"

namespace bic::simd {

#if !defined(__AVX512F__)
#define BIC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
BIC_INLINE void transpose8(i32x8* r) {
  i32x8 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = BIC_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = BIC_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const int x = i & 4 | (i >> 1 & 1);
    u[i] = i & 1 ? BIC_SHUFFLE(t[x], t[x + 2], 2, 3, 10, 11, 6, 7, 14, 15)
                 : BIC_SHUFFLE(t[x], t[x + 2], 0, 1, 8, 9, 4, 5, 12, 13);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = BIC_SHUFFLE(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = BIC_SHUFFLE(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#undef BIC_SHUFFLE
#endif

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
  i32x8 t[8];
  for (int half = 0; half < 2; half++)  // rows 0 to 7, rows 8 to 15
    for (int side = 0; side < 2; side++) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) t[i] = side ? r[8 * half + i].b : r[8 * half + i].a;
      transpose8(t);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) (side ? r[8 * half + i].b : r[8 * half + i].a) = t[i];
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) std::swap(r[i].b, r[8 + i].a);
#endif
}

}  // namespace bic::simd

#endif
