// Sums by index, in the order of kernels/scatter.
#include "../common/tensor.h"
#include "../common/wide.h"

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

// Up to 16 columns of one output row: `row` of self, and the sources at `positions`.
template <class T>
void sum_columns(const T* row, const T* added, int64_t stride, const int64_t* positions,
                 const int64_t* end, double factor, int64_t n, T* out) {
  if (n < W / 4) {
    for (int64_t m = 0; m < n; m++) {
      double acc = to_float(row[m]);
      for (const int64_t* p = positions; p < end; p++)
        acc += factor * to_float(added[*p * stride + m]);
      out[m] = from_float<T>((float)acc);
    }
  } else if (n < W) {
    f64x16 acc = wide(load(row, n));
    for (const int64_t* p = positions; p < end; p++)
      acc = acc + wide(factor) * wide(load(added + *p * stride, n));
    store(out, narrow(acc), n);
  } else {
    f64x16 acc = wide(load(row));
    for (const int64_t* p = positions; p < end; p++)
      acc = acc + wide(factor) * wide(load(added + *p * stride));
    store(out, narrow(acc));
  }
}

Tensor with_dense_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

Tensor index_add(const Tensor& self, const Tensor& index, const Tensor& source, double alpha) {
  const int64_t S = self.size(0), M = self.size(1), K = index.size(0);
  STD_TORCH_CHECK(source.size(0) == K && source.size(1) == M, "index_add: sizes do not fit");
  STD_TORCH_CHECK(self.scalar_type() == source.scalar_type(), "index_add: dtypes differ");
  const Tensor out = empty(self, {S, M});
  if (out.numel() == 0) return out;
  const Lists lists = index.scalar_type() == ScalarType::Long
                          ? Lists(data<int64_t>(index), index.stride(0), K, S)
                          : Lists(data<int32_t>(index), index.stride(0), K, S);
  const Tensor rows = with_dense_rows(self), sources = with_dense_rows(source);
  const double factor = (float)alpha;
  dispatch(self.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const int64_t row_stride = rows.stride(0), stride = sources.stride(0);
    const T *const start = data<T>(rows), *const added = data<T>(sources);
    T* const to = mutable_data<T>(out);
    const int64_t* const positions = lists.positions.data();
    parallel(S, M * (K / S + 2), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; s++) {
        const int64_t *first = positions + lists.starts[s], *last = positions + lists.starts[s + 1];
        for (int64_t m = 0; m < M; m += W) {
          const T* row = start + s * row_stride + m;
          T* result = to + s * M + m;
          const int64_t n = std::min(W, M - m);
          if (first == last) store_block(result, load_block(row, n), n);
          else sum_columns(row, added + m, stride, first, last, factor, n, result);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("index_add", TORCH_BOX(&index_add)); }

}  // namespace bic::simd
