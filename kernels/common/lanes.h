// Sixteen float lanes with the same bits on AVX-512, AVX2 and plain C++.
//
// Every operation here is exactly rounded (IEEE +, -, *, /, sqrt, fma, conversions), so that an
// instruction set may change the speed but no bit. `f32x16` is a GNU vector on AVX-512, a pair of
// 8-lane ones elsewhere (GCC keeps vectors wider than a register in memory, a pair in registers).
// A NaN is stored as the one positive quiet NaN: payloads would depend on the operand order.
#ifndef BICOMPILE_LANES_H
#define BICOMPILE_LANES_H

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "functions.h"

namespace bic::simd {

constexpr int64_t W = 16;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

template <class To, class From>
BIC_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// ---- the vector type, its arithmetic, comparisons (a mask of 0 / -1 lanes) and selection

#if defined(__AVX512F__)
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

BIC_INLINE f32x16 splat(float x) { return (f32x16)_mm512_set1_ps(x); }
BIC_INLINE i32x16 splat_int(int32_t x) { return (i32x16)_mm512_set1_epi32(x); }
BIC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
BIC_INLINE f32x16 sqrt(f32x16 a) { return (f32x16)_mm512_sqrt_ps((__m512)a); }
BIC_INLINE f32x16 select(i32x16 mask, f32x16 a, f32x16 b) { return mask ? a : b; }
BIC_INLINE f32x8 low(f32x16 v) { return (f32x8)_mm512_castps512_ps256((__m512)v); }
BIC_INLINE f32x8 high(f32x16 v) {
  return (f32x8)_mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
}
BIC_INLINE f32x16 as_float(i32x16 v) { return (f32x16)v; }
BIC_INLINE i32x16 as_int(f32x16 v) { return (i32x16)v; }
BIC_INLINE i32x16 shift_left_16(i32x16 v) { return v << 16; }
BIC_INLINE i32x16 shift_right_16(i32x16 v) { return (i32x16)_mm512_srli_epi32((__m512i)v, 16); }
#else
struct i32x16 {
  i32x8 a, b;
};
struct f32x16 {
  f32x8 a, b;
};
#define BIC_OP(R, T, op) \
  BIC_INLINE R operator op(T x, T y) { return {x.a op y.a, x.b op y.b}; }
BIC_OP(f32x16, f32x16, +)
BIC_OP(f32x16, f32x16, -)
BIC_OP(f32x16, f32x16, *)
BIC_OP(f32x16, f32x16, /)
BIC_OP(i32x16, f32x16, <)
BIC_OP(i32x16, f32x16, >)
BIC_OP(i32x16, f32x16, ==)
BIC_OP(i32x16, f32x16, !=)
BIC_OP(i32x16, i32x16, <)
BIC_OP(i32x16, i32x16, &)
BIC_OP(i32x16, i32x16, |)
#undef BIC_OP
BIC_INLINE f32x8 splat8(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
BIC_INLINE f32x16 splat(float x) { return {splat8(x), splat8(x)}; }
BIC_INLINE i32x16 splat_int(int32_t x) {
  i32x8 v = {x, x, x, x, x, x, x, x};
  return {v, v};
}
#if defined(__FMA__)
BIC_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
BIC_INLINE f32x8 sqrt8(f32x8 a) { return (f32x8)_mm256_sqrt_ps((__m256)a); }
#else
BIC_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
  for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
BIC_INLINE f32x8 sqrt8(f32x8 a) {
  for (int i = 0; i < 8; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
#endif
BIC_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {fma8(a.a, b.a, c.a), fma8(a.b, b.b, c.b)};
}
BIC_INLINE f32x16 sqrt(f32x16 v) { return {sqrt8(v.a), sqrt8(v.b)}; }
BIC_INLINE f32x16 select(i32x16 m, f32x16 a, f32x16 b) {
  return {m.a ? a.a : b.a, m.b ? a.b : b.b};
}
BIC_INLINE f32x8 low(f32x16 v) { return v.a; }
BIC_INLINE f32x8 high(f32x16 v) { return v.b; }
BIC_INLINE f32x16 as_float(i32x16 v) { return {(f32x8)v.a, (f32x8)v.b}; }
BIC_INLINE i32x16 as_int(f32x16 v) { return {(i32x8)v.a, (i32x8)v.b}; }
BIC_INLINE i32x16 shift_left_16(i32x16 v) { return {v.a << 16, v.b << 16}; }
BIC_INLINE i32x16 shift_right_16(i32x16 v) {  // unsigned
  typedef uint32_t u32x8 __attribute__((vector_size(32)));
  return {(i32x8)((u32x8)v.a >> 16), (i32x8)((u32x8)v.b >> 16)};
}
#endif

BIC_INLINE f32x16 zero() { return splat(0.f); }
BIC_INLINE f32x16 abs(f32x16 v) { return as_float(as_int(v) & splat_int(0x7fffffff)); }

// The first n lanes.
BIC_INLINE i32x16 first(int64_t n) {
#if defined(__AVX512F__)
  const i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  const i32x16 index = {{0, 1, 2, 3, 4, 5, 6, 7}, {8, 9, 10, 11, 12, 13, 14, 15}};
#endif
  return index < splat_int((int32_t)n);
}

// ---- half types, one value at a time: to and from float, round to nearest even

BIC_INLINE float to_float(float x) { return x; }
BIC_INLINE float to_float(bf16 x) { return bit_cast<float>((uint32_t)x.bits << 16); }
BIC_INLINE float to_float(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fff, sign = (uint32_t)(x.bits & 0x8000) << 16;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float value = magnitude >= 0x400 ? bit_cast<float>((magnitude << 13) + (112u << 23))
                                         : (float)magnitude * 0x1p-24f;
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

template <class T>
T from_float(float x);
template <>
BIC_INLINE float from_float<float>(float x) {
  return x == x ? x : bit_cast<float>(0x7fc00000u);
}
template <>
BIC_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  return {x == x ? (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16) : (uint16_t)0x7fc0};
}
template <>
BIC_INLINE f16 from_float<f16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (x != x) return {0x7e00};
  if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // rounds to 65536 or more
  uint32_t half;
  if (magnitude >= 0x38800000)
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  else  // adding 0.5 leaves the subnormal, correctly rounded, in the low bits
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  return {(uint16_t)(sign | half)};
}

// ---- loads and stores of 16 elements, or of the first n (other lanes read as 0, are not written)

#if defined(__AVX512F__)
BIC_INLINE __mmask16 first_bits(int64_t n) { return (__mmask16)((1u << n) - 1); }
BIC_INLINE f32x16 widen(__m256i v, bf16) {
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
}
BIC_INLINE f32x16 widen(__m256i v, f16) { return (f32x16)_mm512_cvtph_ps(v); }
BIC_INLINE __m256i narrow(f32x16 v, bf16) {
  const __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(_mm512_srli_epi32(r, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}
BIC_INLINE __m256i narrow(f32x16 v, f16) {
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m256i r = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_mask_mov_epi16(r, nan, _mm256_set1_epi16(0x7e00));
}
BIC_INLINE f32x16 load(const float* p) { return (f32x16)_mm512_loadu_ps(p); }
BIC_INLINE f32x16 load(const float* p, int64_t n) {
  return (f32x16)_mm512_maskz_loadu_ps(first_bits(n), p);
}
BIC_INLINE void store(float* p, f32x16 v) {
  _mm512_storeu_ps(p, (__m512)select(v == v, v, as_float(splat_int(0x7fc00000))));
}
BIC_INLINE void store_raw(float* p, f32x16 v) { _mm512_storeu_ps(p, (__m512)v); }
BIC_INLINE void store(float* p, f32x16 v, int64_t n) {
  v = select(v == v, v, as_float(splat_int(0x7fc00000)));
  _mm512_mask_storeu_ps(p, first_bits(n), (__m512)v);
}
template <class T>
BIC_INLINE f32x16 load(const T* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), T{});
}
template <class T>
BIC_INLINE f32x16 load(const T* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_bits(n), p), T{});
}
template <class T>
BIC_INLINE void store(T* p, f32x16 v) {
  _mm256_storeu_si256((__m256i*)p, narrow(v, T{}));
}
template <class T>
BIC_INLINE void store(T* p, f32x16 v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_bits(n), narrow(v, T{}));
}
BIC_INLINE f32x16 rounded(f32x16 v, float) { return v; }
template <class T>
BIC_INLINE f32x16 rounded(f32x16 v, T) {
  return widen(narrow(v, T{}), T{});
}
#else
// Halves through these types, for GCC copies a struct of 64 bytes in pieces of 16. (Name the types:
// `auto` would forget that they are unaligned.)
typedef float f32x8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i32x8_unaligned __attribute__((vector_size(32), aligned(1), may_alias));
BIC_INLINE f32x16 load(const float* p) {
  return {*(const f32x8_unaligned*)p, *(const f32x8_unaligned*)(p + 8)};
}
BIC_INLINE void store_raw(float* p, f32x16 v) {
  *(f32x8_unaligned*)p = v.a;
  *(f32x8_unaligned*)(p + 8) = v.b;
}
BIC_INLINE void store(float* p, f32x16 v) {
  store_raw(p, select(v == v, v, as_float(splat_int(0x7fc00000))));
}
#if defined(__AVX2__) && defined(__F16C__)
BIC_INLINE f32x8 widen8(const bf16* p) {
  const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (f32x8)_mm256_slli_epi32(v, 16);
}
BIC_INLINE f32x8 widen8(const f16* p) {
  return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
BIC_INLINE void narrow8(bf16* p, f32x8 v) {
  const __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  r = _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), _mm256_srli_epi32(r, 16), (__m256i)(v == v));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
BIC_INLINE void narrow8(f16* p, f32x8 v) {
  v = (i32x8)(v == v) ? v : (f32x8)_mm256_set1_epi32(0x7fc00000);
  const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, nearest));
}
#else
template <class T>
BIC_INLINE f32x8 widen8(const T* p) {
  f32x8 v;
  for (int i = 0; i < 8; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T>
BIC_INLINE void narrow8(T* p, f32x8 v) {
  for (int i = 0; i < 8; i++) p[i] = from_float<T>(v[i]);
}
#endif
template <class T>
BIC_INLINE f32x16 load(const T* p) {
  return {widen8(p), widen8(p + 8)};
}
template <class T>
BIC_INLINE void store(T* p, f32x16 v) {
  narrow8(p, v.a);
  narrow8(p + 8, v.b);
}
template <class T>
BIC_INLINE f32x16 load(const T* p, int64_t n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
BIC_INLINE void store(T* p, f32x16 v, int64_t n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}
template <class T>
BIC_INLINE f32x16 rounded(f32x16 v, T) {
  T buffer[W];
  store(buffer, v);
  return load(buffer);
}
#endif

// 16 words of 32 bits.
#if defined(__AVX512F__)
BIC_INLINE i32x16 load_words(const void* p) { return (i32x16)_mm512_loadu_si512(p); }
BIC_INLINE void store_words(void* p, i32x16 v) { _mm512_storeu_si512(p, (__m512i)v); }
#else
BIC_INLINE i32x16 load_words(const void* p) {
  const i32x8_unaligned* half = (const i32x8_unaligned*)p;
  return {half[0], half[1]};
}
BIC_INLINE void store_words(void* p, i32x16 v) {
  i32x8_unaligned* half = (i32x8_unaligned*)p;
  half[0] = v.a;
  half[1] = v.b;
}
#endif

// ---- across lanes

// 16 lanes to one: lane[i] = op(lane[i], lane[i + w]) for w = 8, 4, 2, 1.
template <class Op>
BIC_INLINE float tree(f32x16 v, Op op) {
  float t[W];
  store_raw(t, v);
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] = op(t[i], t[i + w]);
  return t[0];
}
BIC_INLINE float tree_sum(f32x16 v) {
  const f32x8 a = low(v) + high(v);
  const f32x4 b =
      __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// The larger lane of two; a NaN in x is passed over, so that the result does not depend on order.
BIC_INLINE f32x16 max_or_skip(f32x16 x, f32x16 m) { return select(x > m, x, m); }
BIC_INLINE float max_lane(f32x16 v) {
  return tree(v, [](float a, float b) { return a > b ? a : b; });
}

// ---- elementary functions

#if defined(__AVX512F__)
BIC_INLINE f32x16 exp(f32x16 v) { return bic::exp(v); }
BIC_INLINE f32x16 log(f32x16 v) { return bic::log(v); }
BIC_INLINE f32x16 tanh(f32x16 v) { return bic::tanh(v); }
#else
BIC_INLINE f32x16 exp(f32x16 v) { return {bic::exp(v.a), bic::exp(v.b)}; }
BIC_INLINE f32x16 log(f32x16 v) { return {bic::log(v.a), bic::log(v.b)}; }
BIC_INLINE f32x16 tanh(f32x16 v) { return {bic::tanh(v.a), bic::tanh(v.b)}; }
#endif

// ---- rounding mode of the thread

// Sets round-to-nearest with subnormals (or without them) for a scope, whatever the thread had.
class FloatMode {
 public:
#if defined(__SSE2__)
  explicit FloatMode(bool flush = false) : saved_(_mm_getcsr()) {
    const unsigned wanted = flush ? 0x9fc0 : 0x1f80;
    if ((saved_ & ~0x3fu) != wanted) _mm_setcsr(wanted);
  }
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  explicit FloatMode(bool = false) {}
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__SSE2__)
  unsigned saved_;
#endif
};

}  // namespace bic::simd

#endif
