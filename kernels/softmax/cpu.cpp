// softmax and log_softmax over one axis, in the order of kernels/softmax.
#include "../common/tensor.h"

namespace bic::simd {
namespace {

// The largest element; NaN is passed over (it comes back through exp).
template <class T>
float row_max(const T* x, int64_t K) {
  f32x16 m0 = splat(-INFINITY), m1 = m0, m2 = m0, m3 = m0;  // exact in any order
  int64_t k = 0;
  for (; k + 4 * W <= K; k += 4 * W) {
    m0 = max_or_skip(load(x + k), m0);
    m1 = max_or_skip(load(x + k + W), m1);
    m2 = max_or_skip(load(x + k + 2 * W), m2);
    m3 = max_or_skip(load(x + k + 3 * W), m3);
  }
  for (; k + W <= K; k += W) m0 = max_or_skip(load(x + k), m0);
  if (k < K) m0 = select(first(K - k), max_or_skip(load(x + k, K - k), m0), m0);
  return max_lane(max_or_skip(max_or_skip(m0, m1), max_or_skip(m2, m3)));
}

// The sum of exp(x - max), kept in `e` where it is given.
template <class T>
float exp_sum(const T* x, int64_t K, float max, float* e) {
  const f32x16 top = splat(max);
  f32x16 acc = zero();
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    const f32x16 v = exp(load(x + k) - top);
    if (e) store_raw(e + k, v);
    acc = acc + v;
  }
  if (k < K) {
    const f32x16 v = exp(load(x + k, K - k) - top);
    if (e) store(e + k, v, K - k);
    acc = select(first(K - k), acc + v, acc);
  }
  return tree_sum(acc);
}

template <class T, class Out>
void softmax_row(const T* x, int64_t K, float* e, Out* out) {
  const f32x16 sum = splat(exp_sum(x, K, row_max(x, K), e));
  int64_t k = 0;
  for (; k + W <= K; k += W) store(out + k, load(e + k) / sum);
  if (k < K) store(out + k, load(e + k, K - k) / sum, K - k);
}

template <class T, class Out>
void log_softmax_row(const T* x, int64_t K, float*, Out* out) {
  const float max = row_max(x, K);
  const f32x16 top = splat(max), shift = log(splat(exp_sum(x, K, max, nullptr)));
  int64_t k = 0;
  for (; k + W <= K; k += W) store(out + k, (load(x + k) - top) - shift);
  if (k < K) store(out + k, (load(x + k, K - k) - top) - shift, K - k);
}

// Rows along `dim`; out is contiguous, its rows are filled in place where they are contiguous too.
template <bool kLog, class T, class Out>
void all_rows(const Tensor& self, int64_t dim, Out* out) {
  Axes kept, row, out_kept;
  int64_t stride = self.numel(), step = 1;
  for (int64_t d = 0; d < self.dim(); d++) {
    stride /= self.size(d);
    if (d == dim) step = stride;
    (d == dim ? row : kept).add(self.size(d), self.stride(d));
    if (d != dim) out_kept.add(self.size(d), stride);
  }
  const int64_t K = row.numel();
  parallel(kept.numel(), 8 * K, [&](int64_t begin, int64_t end) {
    const Rows<T> rows(self, kept, row);
    const Scratch<float> e(K);
    const Scratch<Out> buffer(step == 1 ? 0 : K);
    for (int64_t i = begin; i < end; i++) {
      Out* to = out + out_kept.offset(i);
      Out* o = step == 1 ? to : buffer;
      if constexpr (kLog) log_softmax_row(rows[i], K, e, o);
      else softmax_row(rows[i], K, e, o);
      if (step != 1) for (int64_t k = 0; k < K; k++) to[k * step] = o[k];
    }
  });
}

template <bool kLog>
Tensor over_axis(const Tensor& self, int64_t dim, ScalarType type) {
  Tensor out = empty(self, sizes(self), type);
  if (self.numel() == 0) return out;
  dispatch(self.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if (type == self.scalar_type()) all_rows<kLog, T>(self, dim, mutable_data<T>(out));
    else all_rows<kLog, T>(self, dim, mutable_data<float>(out));
  });
  return out;
}

Tensor softmax(const Tensor& self, int64_t dim, ScalarType type) {
  return over_axis<false>(self, dim < 0 ? dim + self.dim() : dim, type);
}
Tensor log_softmax(const Tensor& self, int64_t dim, ScalarType type) {
  return over_axis<true>(self, dim < 0 ? dim + self.dim() : dim, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("log_softmax", TORCH_BOX(&log_softmax));
}

}  // namespace bic::simd
