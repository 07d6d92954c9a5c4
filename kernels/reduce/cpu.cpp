// sum, mean, prod, var, std, logsumexp and norm over any axes, in the order of kernels/reduce.
#include "../common/tensor.h"
#include "../common/wide.h"

namespace bic::simd {
namespace {

const float kInf = INFINITY;

// ---- the steps: an identity, how an element enters a lane, how two lanes meet

struct Sum {
  f64x16 identity() const { return wide(0.0); }
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const { return acc + wide(x); }
  template <class V>
  BIC_INLINE V join(V a, V b) const { return a + b; }
};
struct Product {
  f64x16 identity() const { return wide(1.0); }
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const { return acc * wide(x); }
  template <class V>
  BIC_INLINE V join(V a, V b) const { return a * b; }
};
struct SumSquares : Sum {  // of the distances to a centre
  f64x16 centre;
  explicit SumSquares(f64x16 c) : centre(c) {}
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const {
    const f64x16 d = wide(x) - centre;
    return acc + d * d;
  }
};
struct SumExp : Sum {
  f32x16 max;
  explicit SumExp(f32x16 m) : max(m) {}
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const { return acc + wide(exp(x - max)); }
};
struct SumAbs : Sum {
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const { return acc + wide(abs(x)); }
};
struct CountNonzero : Sum {
  BIC_INLINE f64x16 step(f64x16 acc, f32x16 x) const {
    return acc + wide(select(x != zero(), splat(1.f), zero()));
  }
};
struct SumPower : Sum {
  double p;
  explicit SumPower(double power) : p(power) {}
  f64x16 step(f64x16 acc, f32x16 x) const {
    return acc + map(wide(abs(x)), [this](double v) { return std::pow(v, p); });
  }
};
struct Max {  // passes over NaN: the sums that follow bring it back
  f32x16 identity() const { return splat(-kInf); }
  BIC_INLINE f32x16 step(f32x16 acc, f32x16 x) const { return max_or_skip(x, acc); }
  BIC_INLINE f32x16 join(f32x16 a, f32x16 b) const { return max_or_skip(a, b); }
  BIC_INLINE float join(float a, float b) const { return a > b ? a : b; }
};
struct MaxAbs {  // keeps NaN; sign = -1 makes it the least magnitude
  float sign;
  f32x16 identity() const { return splat(sign > 0 ? 0.f : -kInf); }
  BIC_INLINE f32x16 step(f32x16 acc, f32x16 x) const { return join(acc, splat(sign) * abs(x)); }
  BIC_INLINE f32x16 join(f32x16 a, f32x16 b) const {
    return select((b > a) | (b != b), b, a);
  }
  BIC_INLINE float join(float a, float b) const { return b > a || b != b ? b : a; }
};

// ---- where the K elements of one output, or of 16 neighbouring outputs, are

f32x16 every_lane(float x) { return splat(x); }
f64x16 every_lane(double x) { return wide(x); }
f32x16 first(int64_t n, f32x16 a, f32x16 b) { return select(simd::first(n), a, b); }
using simd::first;

// One output whose elements are contiguous: lane l takes k = l, l + 16, ...; every lane returns it.
struct Row {
  const float* p;
  int64_t K;

  template <class Op>
  auto reduce(const Op& op) const {
    auto acc = op.identity();
    int64_t k = 0;
    for (; k + W <= K; k += W) acc = op.step(acc, load(p + k));
    if (k < K) acc = first(K - k, op.step(acc, load(p + k, K - k)), acc);
    return every_lane(tree(acc, [&](auto a, auto b) { return op.join(a, b); }));
  }
};

// 16 outputs side by side, memory [K][16]: a vector of outputs for each of the 16 lanes of k.
struct Columns {
  const float* p;
  int64_t K;

  template <class Op>
  auto reduce(const Op& op) const {
    decltype(op.identity()) acc[W];
    for (int64_t l = 0; l < W; l++) {
      acc[l] = op.identity();
      for (int64_t k = l; k < K; k += W) acc[l] = op.step(acc[l], load(p + k * W));
    }
    for (int w = 8; w > 0; w /= 2)
      for (int i = 0; i < w; i++) acc[i] = op.join(acc[i], acc[i + w]);
    return acc[0];
  }
};

// ---- the formulas, on a Row or Columns of K elements

template <class Source>
f64x16 variance(const Source& x, int64_t K, double correction, f64x16& mean) {
  mean = x.reduce(Sum{}) / wide((double)K);
  return x.reduce(SumSquares(mean)) / wide(std::max((double)K - correction, 0.0));
}

template <class Source>
f32x16 log_sum_exp(const Source& x) {
  const f32x16 top = x.reduce(Max{});
  const f32x16 finite = select(abs(top) == splat(kInf), zero(), top);
  return log(narrow(x.reduce(SumExp(finite)))) + finite;
}

template <class Source>
f32x16 vector_norm(const Source& x, int64_t K, double p) {
  if (K == 0) return splat(p < 0 ? kInf : 0.f);
  if (p == 2.0) return narrow(sqrt(x.reduce(SumSquares(wide(0.0)))));
  if (p == 1.0) return narrow(x.reduce(SumAbs{}));
  if (p == 0.0) return narrow(x.reduce(CountNonzero{}));
  if (p == kInf) return x.reduce(MaxAbs{1.f});
  if (p == -kInf) return splat(-1.f) * x.reduce(MaxAbs{-1.f});
  return narrow(map(x.reduce(SumPower(p)), [=](double v) { return std::pow(v, 1.0 / p); }));
}

// ---- all outputs of a tensor

void __attribute__((noinline))
store_as(ScalarType type, void* out, int64_t i, f32x16 v, int64_t n) {
  dispatch(type, [&](auto t) { store((decltype(t)*)out + i, v, n); });
}

// Copies n <= 16 neighbouring columns into memory [K][16].
void __attribute__((noinline))
gather(const Tensor& self, int64_t start, const Axes& row, int64_t n, float* out) {
  dispatch(self.scalar_type(), [&](auto t) {
    const auto* base = data<decltype(t)>(self) + start;
    row.each(0, row.numel(), [&](int64_t k, int64_t at) {
      store_raw(out + k * W, n == W ? load(base + at) : load(base + at, n));
    });
  });
}

// Calls f(source, K, first output, outputs) for every output, 16 side by side where memory is so.
template <class F>
void for_each_output(const Tensor& self, const Split& split, const F& f) {
  const int64_t outputs = split.kept.numel(), K = split.reduced.numel();
  const int64_t inner = split.kept.inner_size();
  const bool contiguous = split.reduced.rank() <= 1 && split.reduced.inner_stride() == 1;
  if (contiguous || split.kept.inner_stride() != 1 || inner < 4) {
    parallel(outputs, K, [&](int64_t begin, int64_t end) {
      const Rows<float> rows(self, split.kept, split.reduced);
      for (int64_t i = begin; i < end; i++) f(Row{rows[i], K}, K, i, (int64_t)1);
    });
    return;
  }
  const int64_t strips = (inner + W - 1) / W;
  parallel(outputs / inner * strips, K * W, [&](int64_t begin, int64_t end) {
    const Scratch<float> columns(K * W);
    for (int64_t i = begin; i < end; i++) {
      const int64_t o = i / strips * inner + i % strips * W;
      const int64_t n = std::min(W, inner - i % strips * W);
      gather(self, split.kept.offset(o), split.reduced, n, columns);
      f(Columns{columns, K}, K, o, n);
    }
  });
}

template <class F>
Tensor reduce(const Tensor& self, const Sizes& dim, bool keepdim, ScalarType type, const F& f) {
  const Split split(self, dim, keepdim);
  Tensor out = empty(self, split.shape, type);
  void* p = out.mutable_data_ptr();
  for_each_output(self, split, [&](const auto& x, int64_t K, int64_t i, int64_t n) {
    store_as(type, p, i, f(x, K), n);
  });
  return out;
}

// ---- the ops

Tensor sum(const Tensor& self, Sizes dim, bool keepdim, ScalarType type) {
  return reduce(self, dim, keepdim, type,
                [](const auto& x, int64_t) { return narrow(x.reduce(Sum{})); });
}
Tensor mean(const Tensor& self, Sizes dim, bool keepdim, ScalarType type) {
  return reduce(self, dim, keepdim, type,
                [](const auto& x, int64_t K) { return narrow(x.reduce(Sum{}) / wide((double)K)); });
}
Tensor prod(const Tensor& self, Sizes dim, bool keepdim, ScalarType type) {
  return reduce(self, dim, keepdim, type,
                [](const auto& x, int64_t) { return narrow(x.reduce(Product{})); });
}
Tensor var(const Tensor& self, Sizes dim, double correction, bool keepdim) {
  return reduce(self, dim, keepdim, self.scalar_type(), [=](const auto& x, int64_t K) {
    f64x16 mean;
    return narrow(variance(x, K, correction, mean));
  });
}
Tensor std_(const Tensor& self, Sizes dim, double correction, bool keepdim) {
  return reduce(self, dim, keepdim, self.scalar_type(), [=](const auto& x, int64_t K) {
    f64x16 mean;
    return narrow(sqrt(variance(x, K, correction, mean)));
  });
}
std::tuple<Tensor, Tensor> var_mean(const Tensor& self, Sizes dim, double correction,
                                    bool keepdim) {
  const Split split(self, dim, keepdim);
  const ScalarType type = self.scalar_type();
  Tensor vars = empty(self, split.shape), means = empty(self, split.shape);
  void *v = vars.mutable_data_ptr(), *m = means.mutable_data_ptr();
  for_each_output(self, split, [&](const auto& x, int64_t K, int64_t i, int64_t n) {
    f64x16 mean;
    store_as(type, v, i, narrow(variance(x, K, correction, mean)), n);
    store_as(type, m, i, narrow(mean), n);
  });
  return {vars, means};
}
Tensor logsumexp(const Tensor& self, Sizes dim, bool keepdim) {
  return reduce(self, dim, keepdim, self.scalar_type(),
                [](const auto& x, int64_t) { return log_sum_exp(x); });
}
Tensor norm(const Tensor& self, double p, Sizes dim, bool keepdim, ScalarType type) {
  return reduce(self, dim, keepdim, type,
                [=](const auto& x, int64_t K) { return vector_norm(x, K, p); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("sum", TORCH_BOX(&sum));
  m.impl("mean", TORCH_BOX(&mean));
  m.impl("prod", TORCH_BOX(&prod));
  m.impl("var", TORCH_BOX(&var));
  m.impl("std", TORCH_BOX(&std_));
  m.impl("var_mean", TORCH_BOX(&var_mean));
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
  m.impl("norm", TORCH_BOX(&norm));
}

}  // namespace bic::simd
