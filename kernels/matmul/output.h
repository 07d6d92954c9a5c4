// Where products go: alpha * acc + beta * self, each operation rounded in float, then once to T;
// with round_first acc is rounded to T before, as the product is that it stands for.
#ifndef BICOMPILE_MATMUL_OUTPUT_H
#define BICOMPILE_MATMUL_OUTPUT_H

#include "../common/lanes.h"

namespace bic::simd {

template <class T>
struct Output {
  T* c;
  int64_t ldc;
  const T* self = nullptr;  // null where beta is 0
  int64_t stride_m = 0, stride_n = 0;
  float alpha = 1.f, beta = 0.f;
  bool round_first = false;

  // Row m, columns n to n + count, count <= 16.
  BIC_INLINE void put(int64_t m, int64_t n, f32x16 v, int64_t count) const {
    if (alpha != 1.f) v = splat(alpha) * v;
    if (round_first) v = rounded(v, T{});
    if (self) {
      f32x16 s = bias(self + m * stride_m + n * stride_n, count);
      if (beta != 1.f) s = splat(beta) * s;
      v = v + s;
    }
    T* p = c + m * ldc + n;
    if (count == W) store(p, v);
    else store(p, v, count);
  }

  BIC_INLINE f32x16 bias(const T* p, int64_t count) const {
    if (stride_n == 1) return count == W ? load(p) : load(p, count);
    float t[W] = {};
    for (int64_t i = 0; i < count; i++) t[i] = to_float(p[i * stride_n]);
    return load(t);
  }
};

}  // namespace bic::simd

#endif
