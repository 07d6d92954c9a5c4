// How one lane of a dot product takes its elements: the arithmetic of the three element types.
//
// float and half: a block is 16 elements, lane l takes element l by one fma.
// bfloat16: a block is 32 elements, lane l takes element 2l + 1 by one fma, then element 2l, with
// subnormal operands and results flushed to zero. That is what `vdpbf16ps` does; where the machine
// lacks it, or does it otherwise (tested once), two fma in flush-to-zero mode give the same bits.
#ifndef BICOMPILE_MATMUL_ARITHMETIC_H
#define BICOMPILE_MATMUL_ARITHMETIC_H

#include "../common/lanes.h"

namespace bic::simd {

// A packed element, as in a panel, is one 32-bit word: a float, or two neighbouring bfloat16.
typedef uint32_t Word;

template <class T>
struct Single {
  using Element = T;
  using Panel = Single<float>;  // what works on packed words
  using Vector = f32x16;
  static constexpr int kBlock = 16;
  static constexpr bool kFlush = false;
  static BIC_INLINE Vector read(const T* p) { return load(p); }
  static BIC_INLINE Vector read(const T* p, int64_t n) { return load(p, n); }
  static BIC_INLINE Vector from_words(i32x16 v) { return as_float(v); }
  static BIC_INLINE Vector broadcast(const Word* p) { return splat(bit_cast<float>(*p)); }
  static BIC_INLINE f32x16 mac(f32x16 acc, Vector a, Vector b) { return fma(a, b, acc); }
};

struct PairByFma {
  using Element = bf16;
  using Panel = PairByFma;
  struct Vector {
    f32x16 odd, even;
  };
  static constexpr int kBlock = 32;
  static constexpr bool kFlush = true;
  static BIC_INLINE Vector from_words(i32x16 v) {
    return {as_float(v & splat_int((int32_t)0xffff0000)), as_float(shift_left_16(v))};
  }
  static BIC_INLINE Vector read(const bf16* p) { return from_words(load_words(p)); }
  static BIC_INLINE Vector read(const bf16* p, int64_t n) {
    bf16 buffer[kBlock] = {};
    std::memcpy(buffer, p, n * sizeof(bf16));
    return read(buffer);
  }
  static BIC_INLINE Vector broadcast(const Word* p) { return from_words(splat_int((int32_t)*p)); }
  static BIC_INLINE f32x16 mac(f32x16 acc, Vector a, Vector b) {
    return fma(a.even, b.even, fma(a.odd, b.odd, acc));
  }
};

#if defined(__AVX512BF16__)
struct PairByDot {
  using Element = bf16;
  using Panel = PairByDot;
  using Vector = __m512bh;
  static constexpr int kBlock = 32;
  static constexpr bool kFlush = false;
  static BIC_INLINE Vector read(const bf16* p) { return (Vector)_mm512_loadu_si512(p); }
  static BIC_INLINE Vector read(const bf16* p, int64_t n) {
    return (Vector)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  }
  static BIC_INLINE Vector from_words(i32x16 v) { return (Vector)v; }
  static BIC_INLINE Vector broadcast(const Word* p) { return (Vector)_mm512_set1_epi32((int)*p); }
  static BIC_INLINE f32x16 mac(f32x16 acc, Vector a, Vector b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b);
  }
};

// Whether vdpbf16ps gives the bits of PairByFma here; asked once, on values of every magnitude.
inline bool dot_equals_fma() {
  static const bool equal = [] {
    uint32_t state = 1;
    const auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (int round = 0; round < 256; round++) {
      bf16 a[32], b[32];
      float start[W], by_dot[W], by_fma[W];
      for (int i = 0; i < 32; i++) {
        // Near 1 in even rounds; in odd ones products and sums around the least normal number.
        const uint32_t exponent = round % 2 ? 55 + random() % 14 : 120 + random() % 14;
        a[i].bits = (uint16_t)((random() & 0x807f) | exponent << 7);
        const uint32_t other = round % 8 == 7 ? random() % 3 : exponent;  // subnormals too
        b[i].bits = (uint16_t)((random() & 0x807f) | other << 7);
      }
      const uint32_t kept = round % 2 ? 0x80ff : 0xbfff;
      for (auto& x : start) x = to_float(bf16{(uint16_t)(random() & kept)});
      {
        FloatMode mode;
        store_raw(by_dot, PairByDot::mac(load(start), PairByDot::read(a), PairByDot::read(b)));
      }
      {
        FloatMode mode(true);
        asm volatile("" ::: "memory");
        store_raw(by_fma, PairByFma::mac(load(start), PairByFma::read(a), PairByFma::read(b)));
        asm volatile("" ::: "memory");
      }
      if (std::memcmp(by_dot, by_fma, sizeof(by_dot))) return false;
    }
    return true;
  }();
  return equal;
}
using Pair = PairByDot;
inline bool pair_is_exact() { return dot_equals_fma(); }
#else
using Pair = PairByFma;
inline bool pair_is_exact() { return true; }
#endif

}  // namespace bic::simd

#endif
