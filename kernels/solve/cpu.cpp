// solve_triangular: substitution in double, 16 columns of the right side at a time.
#include "../common/tensor.h"
#include "../common/wide.h"

namespace bic::simd {
namespace {

template <class T>
struct Matrix {
  const T* p;
  int64_t row, column;
  Matrix(const Tensor& t, int64_t b)
      : p(data<T>(t) + b * t.stride(0)), row(t.stride(1)), column(t.stride(2)) {}
  float at(int64_t i, int64_t j) const { return to_float(p[i * row + j * column]); }
};

// n columns of one system; x: K vectors. An upper matrix is a lower one read from its end.
template <class T>
void solve_strip(const Matrix<T>& a, const Matrix<T>& b, T* y, f64x16* x, int64_t K, int64_t N,
                 int64_t n, bool upper, bool unit) {
  float given[W] = {};
  for (int64_t step = 0; step < K; step++) {
    const int64_t i = upper ? K - 1 - step : step;
    for (int64_t c = 0; c < n; c++) given[c] = b.at(i, c);
    f64x16 acc = wide(load(given));
    for (int64_t before = 0; before < step; before++) {
      const int64_t j = upper ? K - 1 - before : before;
      acc = acc - wide((double)a.at(i, j)) * x[j];
    }
    x[i] = unit ? acc : acc / wide((double)a.at(i, i));
    const f32x16 found = narrow(x[i]);
    if (n == W) store(y + i * N, found);
    else store(y + i * N, found, n);
  }
}

Tensor solve_triangular(const Tensor& A, const Tensor& B, bool upper, bool unitriangular) {
  STD_TORCH_CHECK(A.scalar_type() == B.scalar_type(), "solve_triangular: dtypes differ");
  const Tensor out = empty(B, sizes(B));
  const int64_t K = B.size(1), N = B.size(2), strips = (N + W - 1) / W;
  dispatch(B.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel(out.numel() ? B.size(0) * strips : 0, K * K * W, [&](int64_t begin, int64_t end) {
      const Scratch<f64x16> x(K);
      for (int64_t s = begin; s < end; s++) {
        const int64_t b = s / strips, first = s % strips * W;
        Matrix<T> right(B, b);
        right.p += first * right.column;
        solve_strip(Matrix<T>(A, b), right, mutable_data<T>(out) + b * K * N + first, x, K, N,
                    std::min<int64_t>(W, N - first), upper, unitriangular);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("solve_triangular", TORCH_BOX(&solve_triangular));
}

}  // namespace bic::simd
