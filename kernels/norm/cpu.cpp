// layer_norm, rms_norm and group_norm, and their gradients, in the order of kernels/norm.
#include "../common/tensor.h"
#include "rows.h"

namespace bic::simd {
namespace {

struct Moments {
  double mean, rstd;
};

Moments moments(const float* x, int64_t K, float eps) {
  const double mean = lane_sum(x, K, [](f64x16 acc, f32x16 v) { return acc + wide(v); }) / K;
  const f64x16 centre = wide(mean);
  const double squares = lane_sum(x, K, [=](f64x16 acc, f32x16 v) {
    const f64x16 d = wide(v) - centre;
    return acc + d * d;
  });
  return {mean, 1.0 / std::sqrt(squares / K + eps)};
}

// The rows of K elements of a contiguous result of any dtype, written from floats.
struct OutputRows {
  void* base;
  ScalarType type;
  int64_t K;

  OutputRows(const Tensor& t, int64_t k)
      : base(t.mutable_data_ptr()), type(t.scalar_type()), K(k) {}
  void write(int64_t i, const float* row) const {
    dispatch(type, [&](auto t) { convert(row, K, static_cast<decltype(t)*>(base) + i * K); });
  }
};

// A weight or bias as contiguous floats, or null.
class Floats {
 public:
  explicit Floats(const std::optional<Tensor>& t) {
    if (!t) return;
    Axes none, axes;
    for (int64_t d = 0; d < t->dim(); d++) axes.add(t->size(d), t->stride(d));
    rows_.emplace(*t, none, std::move(axes));
    data_ = (*rows_)[0];
  }
  operator const float*() const { return data_; }

 private:
  std::optional<Rows<float>> rows_;
  const float* data_ = nullptr;
};

// The axes before the last `n` and these; the shape of statistics that keep them as 1.
Split split_last(const Tensor& input, int64_t n, bool keepdim) {
  Sizes last;
  for (int64_t d = input.dim() - n; d < input.dim(); d++) last.push_back(d);
  return Split(input, last, keepdim);
}

// ---- layer_norm: y = fma((x - mean) * rstd, weight, bias)

void layer_norm_row(const float* x, int64_t K, Moments m, const float* weight, const float* bias,
                    float* out) {
  const f32x16 mean = splat((float)m.mean), rstd = splat((float)m.rstd);
  blocks(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    f32x16 y = (load_block(x + k, n) - mean) * rstd;
    if (weight && bias) y = fma(y, load_block(weight + k, n), load_block(bias + k, n));
    else if (weight) y = y * load_block(weight + k, n);
    else if (bias) y = y + load_block(bias + k, n);
    store_block(out + k, y, n);
  });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input, int64_t ndim,
                                              std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  const Split split = split_last(input, ndim, true);
  const Floats w(weight), b(bias);
  Tensor out = empty(input, sizes(input));
  Tensor mean = empty(input, split.shape, ScalarType::Float);
  Tensor rstd = empty(input, split.shape, ScalarType::Float);
  const OutputRows y(out, split.reduced.numel());
  float *means = mutable_data<float>(mean), *rstds = mutable_data<float>(rstd);
  parallel(split.kept.numel(), 4 * y.K, [&](int64_t begin, int64_t end) {
    const Rows<float> rows(input, split.kept, split.reduced);
    const Scratch<float> buffer(y.K);
    for (int64_t i = begin; i < end; i++) {
      const float* x = rows[i];
      const Moments m = moments(x, y.K, (float)eps);
      means[i] = from_float<float>((float)m.mean);
      rstds[i] = from_float<float>((float)m.rstd);
      layer_norm_row(x, y.K, m, w, b, buffer);
      y.write(i, buffer);
    }
  });
  return {out, mean, rstd};
}

// ---- rms_norm

Tensor rms_norm(const Tensor& input, int64_t ndim, std::optional<Tensor> weight, double eps,
                double offset, bool round_first) {
  const Split split = split_last(input, ndim, true);
  const Floats w(weight);
  Tensor out = empty(input, sizes(input));
  const int64_t K = split.reduced.numel();
  dispatch(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* y = mutable_data<T>(out);
    parallel(split.kept.numel(), 3 * K, [&](int64_t begin, int64_t end) {
      const Rows<T> rows(input, split.kept, split.reduced);
      for (int64_t i = begin; i < end; i++)
        rms_norm_row(rows[i], K, (float)eps, w, (float)offset, round_first, y + i * K);
    });
  });
  return out;
}

// ---- group_norm: a row is the channels of one group of one sample; in double

void group_norm_row(const float* x, int64_t channels, int64_t S, Moments m, const float* weight,
                    const float* bias, float* out) {
  for (int64_t c = 0; c < channels; c++) {
    const f64x16 scale = wide(weight ? m.rstd * weight[c] : m.rstd);
    const f64x16 mean = wide(m.mean), shift = wide(bias ? bias[c] : 0.0);
    blocks(S, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      const f64x16 distance = wide(load_block(x + c * S + k, n)) - mean;
      store_block(out + c * S + k, narrow(distance * scale + shift), n);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& input_, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, int64_t groups,
                                              double eps) {
  const Tensor input = torch::stable::contiguous(input_);
  const Floats w(weight), b(bias);
  const int64_t N = input.size(0), channels = input.size(1) / groups;
  int64_t S = 1;
  for (int64_t d = 2; d < input.dim(); d++) S *= input.size(d);
  Tensor out = empty(input, sizes(input));
  Tensor mean = empty(input, {N, groups}, ScalarType::Float);
  Tensor rstd = empty(input, {N, groups}, ScalarType::Float);
  const OutputRows y(out, channels * S);
  float *means = mutable_data<float>(mean), *rstds = mutable_data<float>(rstd);
  Axes kept, row;
  kept.add(N * groups, y.K);
  row.add(y.K, 1);
  parallel(N * groups, 4 * y.K, [&](int64_t begin, int64_t end) {
    const Rows<float> rows(input, kept, row);
    const Scratch<float> buffer(y.K);
    for (int64_t i = begin; i < end; i++) {
      const float* x = rows[i];
      const Moments m = moments(x, y.K, (float)eps);
      means[i] = from_float<float>((float)m.mean);
      rstds[i] = from_float<float>((float)m.rstd);
      const int64_t c = i % groups * channels;
      group_norm_row(x, channels, S, m, w ? w + c : nullptr, b ? b + c : nullptr, buffer);
      y.write(i, buffer);
    }
  });
  return {out, mean, rstd};
}

// ---- gradients with respect to the input: rstd * ((g - mean(g)) - y * mean(g * y)), in double,
// where g = grad * weight and y = (x - mean) * rstd; without a mean (rms_norm) no mean(g) is taken

struct Gradient {
  const float *grad, *x, *weight;  // weight may be null
  double mean, rstd;
  bool centred;

  BIC_INLINE f64x16 g(int64_t k, int64_t n) const {
    const f64x16 v = wide(load_block(grad + k, n));
    return weight ? v * wide(load_block(weight + k, n)) : v;
  }
  BIC_INLINE f64x16 y(int64_t k, int64_t n) const {
    return (wide(load_block(x + k, n)) - wide(mean)) * wide(rstd);
  }

  void write(int64_t K, float* out) const {
    const double mean_g =
        centred ? lane_sum(K, [&](int64_t k, int64_t n) { return g(k, n); }) / K : 0.0;
    const double mean_gy =
        lane_sum(K, [&](int64_t k, int64_t n) { return g(k, n) * y(k, n); }) / K;
    const f64x16 shift = wide(mean_g), slope = wide(mean_gy);
    blocks(K, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      store_block(out + k, narrow(((g(k, n) - shift) - y(k, n) * slope) * wide(rstd)), n);
    });
  }
};

Tensor layer_norm_backward(const Tensor& grad, const Tensor& input, int64_t ndim,
                           std::optional<Tensor> mean, const Tensor& rstd,
                           std::optional<Tensor> weight) {
  const Split split = split_last(input, ndim, true), grads = split_last(grad, ndim, true);
  const Floats w(weight), means(mean), rstds(rstd);
  Tensor out = empty(input, sizes(input));
  const OutputRows to(out, split.reduced.numel());
  parallel(split.kept.numel(), 8 * to.K, [&](int64_t begin, int64_t end) {
    const Rows<float> x(input, split.kept, split.reduced), g(grad, grads.kept, grads.reduced);
    const Scratch<float> buffer(to.K);
    for (int64_t i = begin; i < end; i++) {
      Gradient{g[i], x[i], w, means ? means[i] : 0.0, rstds[i], means != nullptr}.write(to.K, buffer);
      to.write(i, buffer);
    }
  });
  return out;
}

Tensor group_norm_backward(const Tensor& grad_, const Tensor& input_, const Tensor& mean,
                           const Tensor& rstd, std::optional<Tensor> weight, int64_t groups) {
  const Tensor input = torch::stable::contiguous(input_), grad = torch::stable::contiguous(grad_);
  const Floats w(weight), means(mean), rstds(rstd);
  const int64_t N = input.size(0), channels = input.size(1) / groups;
  int64_t S = 1;
  for (int64_t d = 2; d < input.dim(); d++) S *= input.size(d);
  Tensor out = empty(input, sizes(input));
  const OutputRows to(out, channels * S);
  Axes kept, row;
  kept.add(N * groups, to.K);
  row.add(to.K, 1);
  parallel(N * groups, 8 * to.K, [&](int64_t begin, int64_t end) {
    const Rows<float> x(input, kept, row), g(grad, kept, row);
    const Scratch<float> buffer(to.K), scale(w ? to.K : 0);
    for (int64_t i = begin; i < end; i++) {
      for (int64_t k = 0; w && k < to.K; k++) scale[k] = w[i % groups * channels + k / S];
      const float* const weights = w ? (float*)scale : nullptr;
      Gradient{g[i], x[i], weights, means[i], rstds[i], true}.write(to.K, buffer);
      to.write(i, buffer);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace bic::simd
