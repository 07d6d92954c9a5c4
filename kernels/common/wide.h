// Sixteen double lanes: what sums accumulate in, so that a result is rounded once, at its end.
//
// PyTorch sums float32 in cascades or in double; single-precision lanes would be several times less
// accurate for long rows. Doubles cost two instructions instead of one and no memory.
#ifndef BICOMPILE_WIDE_H
#define BICOMPILE_WIDE_H

#include "lanes.h"

namespace bic::simd {

#if defined(__AVX512F__)
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = 16 / kPart;
typedef double f64part __attribute__((vector_size(8 * kPart)));
typedef float f32part __attribute__((vector_size(4 * kPart)));

struct f64x16 {
  f64part part[kParts];
};

BIC_INLINE f64x16 wide(double x) {
  f64x16 v;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; i++) v.part[i] = x - f64part{};
  return v;
}
#if defined(__AVX512F__)
BIC_INLINE f64x16 wide(f32x16 x) {
  return {(f64part)_mm512_cvtps_pd((__m256)low(x)), (f64part)_mm512_cvtps_pd((__m256)high(x))};
}
#else
BIC_INLINE f64x16 wide(f32x16 x) {
  f32part narrow[kParts];
  static_assert(sizeof(narrow) == sizeof(x));
  std::memcpy(narrow, &x, sizeof(x));
  f64x16 v;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; i++) v.part[i] = __builtin_convertvector(narrow[i], f64part);
  return v;
}
#endif
BIC_INLINE f32x16 narrow(f64x16 v) {
  f32part parts[kParts];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; i++) parts[i] = __builtin_convertvector(v.part[i], f32part);
  f32x16 x;
  std::memcpy(&x, parts, sizeof(x));
  return x;
}

#define BIC_WIDE(op)                                                     \
  BIC_INLINE f64x16 operator op(f64x16 a, f64x16 b) {                    \
    _Pragma("GCC unroll 4")                                              \
    for (int i = 0; i < kParts; i++) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                            \
  }
BIC_WIDE(+)
BIC_WIDE(-)
BIC_WIDE(*)
BIC_WIDE(/)
#undef BIC_WIDE

// One lane at a time: for the few steps behind a sum.
template <class F>
inline f64x16 map(f64x16 v, const F& f) {
  double t[W];
  std::memcpy(t, &v, sizeof(t));
  for (double& x : t) x = f(x);
  std::memcpy(&v, t, sizeof(t));
  return v;
}
inline f64x16 sqrt(f64x16 v) {
  return map(v, [](double x) { return std::sqrt(x); });
}

// Lanes >= n of a become those of b.
BIC_INLINE f64x16 first(int64_t n, f64x16 a, f64x16 b) {
  double x[W], y[W];
  std::memcpy(x, &a, sizeof(x));
  std::memcpy(y, &b, sizeof(y));
  for (int64_t i = n; i < W; i++) x[i] = y[i];
  std::memcpy(&a, x, sizeof(x));
  return a;
}

// 16 lanes to one: lane[i] = op(lane[i], lane[i + w]) for w = 8, 4, 2, 1.
template <class Op>
BIC_INLINE double tree(f64x16 v, Op op) {
  double t[W];
  std::memcpy(t, &v, sizeof(t));
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] = op(t[i], t[i + w]);
  return t[0];
}

// Sum over k of step(x[k]) of a contiguous row, the order of kernels/reduce: lane l takes
// k = l, l + 16, ... in rising order, then the tree.
template <class T, class F>
double lane_sum(const T* x, int64_t K, const F& step) {
  f64x16 acc = wide(0.0);
  int64_t k = 0;
  for (; k + W <= K; k += W) acc = step(acc, load(x + k));
  if (k < K) acc = first(K - k, step(acc, load(x + k, K - k)), acc);
  return tree(acc, [](double a, double b) { return a + b; });
}

// Calls f(k, n) for each block of n <= 16 elements; whole blocks with the constant 16.
template <class F>
BIC_INLINE void blocks(int64_t K, const F& f) {
  int64_t k = 0;
  for (; k + W <= K; k += W) f(k, W);
  if (k < K) f(k, K - k);
}

template <class T>
BIC_INLINE f32x16 load_block(const T* p, int64_t n) { return n == W ? load(p) : load(p, n); }
template <class T>
BIC_INLINE void store_block(T* p, f32x16 v, int64_t n) { n == W ? store(p, v) : store(p, v, n); }

// Sum over k of term(k, n), n <= 16 terms from k on, in the same order.
template <class F>
double lane_sum(int64_t K, const F& term) {
  f64x16 acc = wide(0.0);
  int64_t k = 0;
  for (; k + W <= K; k += W) acc = acc + term(k, W);
  if (k < K) acc = first(K - k, acc + term(k, K - k), acc);
  return tree(acc, [](double a, double b) { return a + b; });
}

}  // namespace bic::simd

#endif
