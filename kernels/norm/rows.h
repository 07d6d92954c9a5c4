// Rows of rms_norm; used by the norms and by what begins with one.
#ifndef BICOMPILE_NORM_ROWS_H
#define BICOMPILE_NORM_ROWS_H

#include <cmath>

#include "../common/wide.h"

namespace bic::simd {

// The roundings of x.float().pow(2).mean(-1), + eps, rsqrt, x * r, weight.
template <class T>
void rms_norm_row(const T* x, int64_t K, float eps, const float* weight, float offset,
                  bool round_first, T* out) {
  const double sum = lane_sum(x, K, [](f64x16 acc, f32x16 v) { return acc + wide(v * v); });
  const float mean = (float)(sum / K);
  const f32x16 r = splat(1.f / std::sqrt(mean + eps)), add = splat(offset);
  blocks(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    f32x16 y = load_block(x + k, n) * r;
    if (weight) {
      f32x16 w = load_block(weight + k, n);
      if (offset != 0.f) w = add + w;
      y = round_first ? rounded(y, T{}) * (offset != 0.f ? rounded(w, T{}) : w) : y * w;
    }
    store_block(out + k, y, n);
  });
}

}  // namespace bic::simd

#endif
