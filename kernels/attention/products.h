// The two products of attention: scores of rows with a panel of keys, and weights with values.
#ifndef BICOMPILE_ATTENTION_PRODUCTS_H
#define BICOMPILE_ATTENTION_PRODUCTS_H

#include "../common/lanes.h"
#include "../common/transpose.h"

namespace bic::simd {

// [B, H, N, D] whose rows are read as they lie.
inline Tensor along_last(const Tensor& t) {
  return t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

constexpr int64_t kPanel = 64;  // keys side by side in a panel [D][64]

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Turns up to 64 keys into out[D rounded up to 16][64]; what is missing is 0.
template <class T>
void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t D, float* out) {
  for (int64_t j = 0; j < kPanel; j += W)
    for (int64_t d = 0; d < D; d += W) {
      i32x16 r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        const T* p = k + (j + i) * stride + d;
        r[i] = as_int(j + i >= keys ? zero() : D - d >= W ? load(p) : load(p, D - d));
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store_raw(out + (d + i) * kPanel + j, as_float(r[i]));
    }
}
// The same for bfloat16, two neighbouring elements at a time.
inline void pack_keys(const bf16* k, int64_t stride, int64_t keys, int64_t D, float* out) {
  constexpr int64_t kPairs = 2 * W;
  for (int64_t j = 0; j < kPanel; j += W)
    for (int64_t d = 0; d < D; d += kPairs) {
      i32x16 r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        bf16 buffer[kPairs] = {};
        const bf16* p = k + (j + i) * stride + d;
        if (j + i < keys && D - d < kPairs) std::memcpy(buffer, p, (D - d) * sizeof(bf16));
        r[i] = load_words(j + i < keys && D - d >= kPairs ? p : buffer);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        if (d + 2 * i >= D) break;
        float* to = out + (d + 2 * i) * kPanel + j;
        store_raw(to, as_float(shift_left_16(r[i])));
        store_raw(to + kPanel, as_float(r[i] & splat_int((int32_t)0xffff0000)));
      }
    }
}

// s[m][key] = the scores of MR rows: one fma chain over even d, one over odd d, and their sum.
template <int MR, int NV>
BIC_INLINE void score_tile(const float* q, int64_t ldq, const float* panel, int64_t D, float* s,
                           int64_t lds) {
  f32x16 acc[2 * MR * NV];
#pragma GCC unroll 32
  for (int i = 0; i < 2 * MR * NV; i++) acc[i] = zero();
  for (int64_t d = 0; d < D; d += 2)
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      f32x16 k[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) k[j] = load(panel + (d + odd) * kPanel + j * W);
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) {
        const f32x16 x = splat(q[m * ldq + d + odd]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
          f32x16& sum = acc[(odd * MR + m) * NV + j];
          sum = fma(x, k[j], sum);
        }
      }
    }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++)
      store_raw(s + m * lds + j * W, acc[m * NV + j] + acc[(MR + m) * NV + j]);
}

#if defined(__AVX512F__)
constexpr int kScoreN = 4;
#else
constexpr int kScoreN = 1;
#endif

// Scores of all rows with a panel; q is padded with zeros to an even D.
inline void scores(const float* q, int64_t ldq, int64_t rows, const float* panel, int64_t D,
                   float* s, int64_t lds) {
  for (int64_t j = 0; j < kPanel; j += kScoreN * W) {
    int64_t m = 0;
    for (; m + 3 <= rows; m += 3)
      score_tile<3, kScoreN>(q + m * ldq, ldq, panel + j, D, s + m * lds + j, lds);
    for (; m < rows; m++)
      score_tile<1, kScoreN>(q + m * ldq, ldq, panel + j, D, s + m * lds + j, lds);
  }
}

// o[m] += sum over keys of p[m][k] * v[k], l[m] += sum of p[m][k]: one chain each, keys rising.
// A tile of one vector may be narrower than 16.
template <class T, int MR, int NV>
BIC_INLINE void value_tile(const float* p, int64_t ldp, const T* v, int64_t stride, int64_t keys,
                           int64_t width, float* o, int64_t ldo, float* l) {
  const auto read = [width](const T* x) { return NV > 1 || width == W ? load(x) : load(x, width); };
  f32x16 acc[MR][NV], sum[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) {
    sum[m] = splat(l[m]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[m][j] = load(o + m * ldo + j * W);
  }
  for (int64_t k = 0; k < keys; k++) {
    f32x16 x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) x[j] = read(v + k * stride + j * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      const f32x16 w = splat(p[m * ldp + k]);
      sum[m] = sum[m] + w;
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[m][j] = fma(w, x[j], acc[m][j]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) {
    l[m] = low(sum[m])[0];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store_raw(o + m * ldo + j * W, acc[m][j]);
  }
}

template <class T, int NV>
void values_of_rows(const float* p, int64_t ldp, int64_t rows, const T* v, int64_t stride,
                    int64_t keys, int64_t width, float* o, int64_t ldo, float* l) {
  int64_t m = 0;
  const auto tile = [&](auto count) __attribute__((always_inline)) {
    constexpr int MR = decltype(count)::value;
    value_tile<T, MR, NV>(p + m * ldp, ldp, v, stride, keys, width, o + m * ldo, ldo, l + m);
    m += MR;
  };
  while (m + 4 <= rows) tile(std::integral_constant<int, 4>{});
  while (m + 3 <= rows) tile(std::integral_constant<int, 3>{});
  while (m < rows) tile(std::integral_constant<int, 1>{});
}

#if defined(__AVX512F__)
constexpr int kValueN = 4;
#else
constexpr int kValueN = 2;
#endif

// o[rows][ldo], l[ceil(Dv / 16)][rows] (the same sum each time) over `keys` more keys.
template <class T>
void values(const float* p, int64_t ldp, int64_t rows, const T* v, int64_t stride, int64_t keys,
            int64_t Dv, float* o, int64_t ldo, float* l) {
  int64_t d = 0;
  for (; d + kValueN * W <= Dv; d += kValueN * W, l += rows)
    values_of_rows<T, kValueN>(p, ldp, rows, v + d, stride, keys, W, o + d, ldo, l);
  for (; d < Dv; d += W, l += rows)
    values_of_rows<T, 1>(p, ldp, rows, v + d, stride, keys, Dv - d < W ? Dv - d : W, o + d, ldo, l);
}

}  // namespace bic::simd

#endif
