// Images whose channels are neighbours in memory (channels_last), and those whose places are.
#ifndef BICOMPILE_CONVOLUTION_CHANNELS_H
#define BICOMPILE_CONVOLUTION_CHANNELS_H

#include "../common/tensor.h"
#include "../common/transpose.h"
#include "../common/wide.h"

namespace bic::simd {

constexpr int64_t kFewChannels = 8;  // below, vectors of channels are too empty

// Whether [B, C, ...] lies in memory as [B, ..., C] does.
inline bool channels_last(const Tensor& t) {
  int64_t next = t.size(1);
  for (int64_t d = t.dim() - 1; d > 1; next *= t.size(d--))
    if (t.stride(d) != next) return false;
  return t.stride(1) == 1 && t.stride(0) == next;
}

// Up to 16 rows of up to 16 elements, as floats, and zeros.
template <class T>
BIC_INLINE void load_square(const T* p, int64_t stride, int64_t rows, int64_t n, i32x16* t) {
  if (rows == W && n == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) t[i] = as_int(load(p + i * stride));
  } else {
    for (int i = 0; i < W; i++)
      t[i] = i < rows ? as_int(load_block(p + i * stride, n)) : splat_int(0);
  }
}

// The image with the places of a channel as neighbours.
template <class T>
Tensor contiguous(const Tensor& t) {
  if (t.numel() == 0 || !channels_last(t)) return torch::stable::contiguous(t);
  const Tensor out = empty(t, sizes(t));
  const int64_t C = t.size(1), places = t.numel() / (t.size(0) * C), blocks = (C + W - 1) / W;
  const T* from = data<T>(t);
  T* to = mutable_data<T>(out);
  parallel(t.size(0) * blocks, W * places, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i / blocks * C * places, c = i % blocks * W;
      const int64_t channels = std::min(W, C - c);
      if (C < kFewChannels) {
        for (int64_t j = 0; j < C; j++)
          for (int64_t p = 0; p < places; p++) to[first + j * places + p] = from[first + p * C + j];
        continue;
      }
      for (int64_t p = 0; p < places; p += W) {
        const int64_t n = std::min(W, places - p);
        i32x16 t[W];
        load_square(from + first + p * C + c, C, n, channels, t);
        transpose(t);
        for (int64_t j = 0; j < channels; j++)
          store_block(to + first + (c + j) * places + p, as_float(t[j]), n);
      }
    }
  });
  return out;
}

}  // namespace bic::simd

#endif
