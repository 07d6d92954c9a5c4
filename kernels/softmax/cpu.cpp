// softmax over one axis, its statistics and its gradient, in the order of kernels/softmax.
#include "../common/tensor.h"
#include "../common/wide.h"

namespace bic::simd {
namespace {

// The largest element; NaN is passed over (it comes back through exp).
float row_max(const float* x, int64_t K) {
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

// The sum of exp(x - max) in double lanes; each term is kept in `e` where that is given.
float exp_sum(const float* x, int64_t K, float max, float* e) {
  const f32x16 top = splat(max);
  f64x16 acc = wide(0.0);
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    const f32x16 v = exp(load(x + k) - top);
    if (e) store_raw(e + k, v);
    acc = acc + wide(v);
  }
  if (k < K) {
    const f32x16 v = exp(load(x + k, K - k) - top);
    if (e) store(e + k, v, K - k);
    acc = acc + wide(select(first(K - k), v, zero()));
  }
  return (float)tree(acc, [](double a, double b) { return a + b; });
}

void softmax_row(const float* x, int64_t K, float* out) {
  const f32x16 sum = splat(exp_sum(x, K, row_max(x, K), out));
  int64_t k = 0;
  for (; k + W <= K; k += W) store(out + k, load(out + k) / sum);
  if (k < K) store(out + k, load(out + k, K - k) / sum, K - k);
}

// grad * y summed over k, rounded to float32: (grad - sum) * y is the gradient.
void softmax_backward_row(const float* grad, const float* y, int64_t K, float* out) {
  const f32x16 sum = splat((float)lane_sum(K, [=](int64_t k, int64_t n) {
    return wide(load_block(grad + k, n)) * wide(load_block(y + k, n));
  }));
  blocks(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    store_block(out + k, (load_block(grad + k, n) - sum) * load_block(y + k, n), n);
  });
}

// A tensor's rows along `dim`.
Rows<float> rows_along(const Tensor& t, int64_t dim) {
  Axes kept, row;
  for (int64_t d = 0; d < t.dim(); d++) (d == dim ? row : kept).add(t.size(d), t.stride(d));
  return Rows<float>(t, std::move(kept), std::move(row));
}

// f(rows of the inputs ..., K, row of the result) for all rows along `dim`; it is contiguous.
template <class F, class... Inputs>
Tensor over_axis(int64_t dim, ScalarType type, const F& f, const Tensor& self,
                 const Inputs&... others) {
  Tensor out = empty(self, sizes(self), type);
  if (self.numel() == 0) return out;
  if (dim < 0) dim += self.dim();
  Axes out_kept;
  int64_t stride = self.numel(), step = 1;
  for (int64_t d = 0; d < self.dim(); d++) {
    stride /= self.size(d);
    if (d == dim) step = stride;
    else out_kept.add(self.size(d), stride);
  }
  const int64_t K = self.dim() ? self.size(dim) : 1;
  const bool in_place = step == 1 && type == ScalarType::Float;
  void* const base = out.mutable_data_ptr();
  parallel(out_kept.numel(), 8 * K, [&](int64_t begin, int64_t end) {
    const auto run = [&](const auto&... rows) {
      const Scratch<float> buffer(in_place ? 0 : K);
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = out_kept.offset(i);
        float* y = in_place ? static_cast<float*>(base) + at : buffer;
        f(rows[i]..., K, y);
        if (in_place) continue;
        dispatch(type, [&](auto t) {
          using T = decltype(t);
          T* to = static_cast<T*>(base) + at;
          if (step == 1) convert(y, K, to);
          else for (int64_t k = 0; k < K; k++) to[k * step] = from_float<T>(y[k]);
        });
      }
    };
    run(rows_along(self, dim), rows_along(others, dim)...);
  });
  return out;
}

Tensor softmax(const Tensor& self, int64_t dim, ScalarType type) {
  return over_axis(dim, type, softmax_row, self);
}
Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, ScalarType type) {
  return over_axis(dim, type, softmax_backward_row, grad, output);
}

float log_of(float x) {
  float lanes[W];
  store_raw(lanes, log(splat(x)));
  return lanes[0];
}

// Of every row the maximum, and the logarithm of the sum.
std::tuple<Tensor, Tensor> softmax_statistics(const Tensor& self, int64_t dim) {
  Axes kept, row;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < self.dim(); d++) {
    (d == dim ? row : kept).add(self.size(d), self.stride(d));
    shape.push_back(d == dim ? 1 : self.size(d));
  }
  Tensor tops = empty(self, shape, ScalarType::Float);
  Tensor shifts = empty(self, shape, ScalarType::Float);
  float *const top = mutable_data<float>(tops), *const shift = mutable_data<float>(shifts);
  const int64_t K = row.numel();
  parallel(kept.numel(), 8 * K, [&](int64_t begin, int64_t end) {
    const Rows<float> rows(self, kept, row);
    for (int64_t i = begin; i < end; i++) {
      const float* const x = rows[i];
      top[i] = row_max(x, K);
      shift[i] = log_of(exp_sum(x, K, top[i], nullptr));
    }
  });
  return {tops, shifts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_statistics", TORCH_BOX(&softmax_statistics));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace bic::simd
