// Sums by index, in the order of kernels/scatter.
#include "../common/tensor.h"

namespace bic::simd {
namespace {

// Positions in the source, those of one target together and in rising order.
struct Lists {
  std::vector<int64_t> starts, positions;

  template <class I>
  Lists(const I* index, int64_t stride, int64_t count, int64_t targets)
      : starts(targets + 2), positions(count) {
    for (int64_t k = 0; k < count; k++) {
      const int64_t target = index[k * stride];
      STD_TORCH_CHECK(0 <= target && target < targets, "index_add: index is out of range");
      starts[target + 2]++;
    }
    for (int64_t s = 2; s <= targets; s++) starts[s] += starts[s - 1];
    for (int64_t k = 0; k < count; k++) positions[starts[index[k * stride] + 1]++] = k;
  }
};

Tensor index_add(const Tensor& self, const Tensor& index, const Tensor& source, double alpha) {
  const int64_t S = self.size(0), M = self.size(1), K = index.size(0);
  STD_TORCH_CHECK(source.size(0) == K && source.size(1) == M, "index_add: sizes do not fit");
  STD_TORCH_CHECK(self.scalar_type() == source.scalar_type(), "index_add: dtypes differ");
  const Tensor out = empty(self, {S, M});
  if (out.numel() == 0) return out;
  const Lists lists = index.scalar_type() == ScalarType::Long
                          ? Lists(data<int64_t>(index), index.stride(0), K, S)
                          : Lists(data<int32_t>(index), index.stride(0), K, S);
  const double factor = (float)alpha;
  dispatch(self.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T *const start = data<T>(self), *const added = data<T>(source);
    T* const to = mutable_data<T>(out);
    parallel(S, M * (K / S + 2), [&](int64_t begin, int64_t end) {
      const Scratch<double> acc(M);
      for (int64_t s = begin; s < end; s++) {
        const T* row = start + s * self.stride(0);
        for (int64_t m = 0; m < M; m++) acc[m] = to_float(row[m * self.stride(1)]);
        for (int64_t i = lists.starts[s]; i < lists.starts[s + 1]; i++) {
          row = added + lists.positions[i] * source.stride(0);
          for (int64_t m = 0; m < M; m++) acc[m] += factor * to_float(row[m * source.stride(1)]);
        }
        for (int64_t m = 0; m < M; m++) to[s * M + m] = from_float<T>((float)acc[m]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("index_add", TORCH_BOX(&index_add)); }

}  // namespace bic::simd
