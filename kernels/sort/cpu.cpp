// The first k of each row in sorted order, in the order of kernels/sort.
#include <limits>

#include "../common/tensor.h"

namespace bic::simd {
namespace {

// An element as an integer: equal for equal numbers, larger for larger ones, largest for NaN.
template <class T>
int64_t key(T x) {
  if constexpr (std::is_integral_v<T>) {
    return (int64_t)x;
  } else if constexpr (std::is_same_v<T, double>) {
    if (x != x) return std::numeric_limits<int64_t>::max();
    const int64_t bits = bit_cast<int64_t>(x), magnitude = bits & ~(1ll << 63);
    return bits < 0 ? -magnitude : magnitude;
  } else {
    const float f = to_float(x);
    if (f != f) return std::numeric_limits<int32_t>::max();
    const int32_t bits = bit_cast<int32_t>(f), magnitude = bits & 0x7fffffff;
    return bits < 0 ? -magnitude : magnitude;
  }
}

template <class F>
void dispatch_all(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Short: return f(int16_t{});
    case ScalarType::Int: return f(int32_t{});
    case ScalarType::Long: return f(int64_t{});
    case ScalarType::Bool: return f(bool{});
    default: return dispatch(type, f);
  }
}

struct Item {
  int64_t key, index;
  bool operator<(const Item& other) const {
    return key != other.key ? key < other.key : index < other.index;
  }
};

// Puts the first k in order. No two items are equal, so any algorithm gives the same result.
void select_first(Item* items, int64_t n, int64_t k) {
  if (k * 64 <= n || k == n) return std::partial_sort(items, items + k, items + n);
  std::nth_element(items, items + k, items + n);
  std::sort(items, items + k);
}

std::tuple<Tensor, Tensor> topk(const Tensor& self, int64_t k, int64_t dim, bool largest) {
  const int64_t rank = self.dim();
  if (dim < 0) dim += rank;
  Sizes shape = sizes(self);
  const int64_t n = shape[dim], stride = self.stride(dim);
  STD_TORCH_CHECK(0 <= k && k <= n, "topk: k is larger than the axis");
  shape[dim] = k;
  const Tensor values = empty(self, shape), indices = empty(self, shape, ScalarType::Long);
  if (values.numel() == 0) return {values, indices};
  Axes kept, out;
  int64_t step = values.numel(), out_stride = 1;
  for (int64_t d = 0; d < rank; d++) {
    step /= shape[d];
    if (d == dim) {
      out_stride = step;
      continue;
    }
    kept.add(self.size(d), self.stride(d));
    out.add(self.size(d), step);
  }
  int64_t* const positions = mutable_data<int64_t>(indices);
  dispatch_all(self.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* const x = data<T>(self);
    T* const y = mutable_data<T>(values);
    parallel(kept.numel(), 8 * n, [&](int64_t begin, int64_t end) {
      const Scratch<Item> items(n);
      for (int64_t row = begin; row < end; row++) {
        const T* const from = x + kept.offset(row);
        for (int64_t i = 0; i < n; i++) {
          const int64_t order = key(from[i * stride]);
          items[i] = {largest ? ~order : order, i};  // ~ turns the order round, without overflow
        }
        select_first(items, n, k);
        const int64_t to = out.offset(row);
        for (int64_t i = 0; i < k; i++) {
          y[to + i * out_stride] = from[items[i].index * stride];
          positions[to + i * out_stride] = items[i].index;
        }
      }
    });
  });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("topk", TORCH_BOX(&topk)); }

}  // namespace bic::simd
