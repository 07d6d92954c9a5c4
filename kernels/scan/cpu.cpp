// cumsum, cumprod and logcumsumexp over one axis: one chain in double for each row.
#include "../common/tensor.h"
#include "../common/transpose.h"
#include "../common/wide.h"
#include "functions.h"

namespace bic::simd {
namespace {

// ---- a step of the chain: of one row (V is double), or of some side by side

template <class V>
struct Sum {
  V total = every<V>(0.0);
  BIC_INLINE V step(V x) { return total = total + x; }
};
template <class V>
struct Product {
  V total = every<V>(1.0);
  BIC_INLINE V step(V x) { return total = total * x; }
};
template <class V>
struct LogSumExp {
  V top = every<V>(-INFINITY), rest = every<V>(0.0);  // rest: sum of exp(x - top), less its top's 1
  BIC_INLINE V step(V x) {
    // Equal ones may be infinite and have no difference. NaN, which is not larger, stays in rest.
    const V lower = x > top ? top - x : x - top, e = x == top ? every<V>(1.0) : exp_below_one(lower);
    rest = x > top ? (rest + 1.0) * e : rest + e;
    top = x > top ? x : top;
    return log_above_one(rest) + top;
  }
};

// 16 rows side by side.
template <template <class> class Op>
struct Lanes16 {
  Op<f64part> parts[kParts];
  BIC_INLINE f32x16 step(f32x16 x) {
    f64x16 v = wide(x);
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i++) v.part[i] = parts[i].step(v.part[i]);
    return narrow(v);
  }
};

// ---- up to 16 rows: where each begins, and the step from one of its elements to the next

template <class T>
struct Strip {
  T* base;
  int64_t starts[W], rows, step;
  bool neighbours = true;  // elements of the same place lie side by side

  Strip(T* memory, const Axes& kept, int64_t first, int64_t n, int64_t along)
      : base(memory), rows(n), step(along) {
    for (int64_t r = 0; r < n; r++) {
      starts[r] = kept.offset(first + r);
      neighbours &= starts[r] == starts[0] + r;
    }
  }
  // Elements k to k + n - 1 of all rows: a vector for each place.
  void load_tile(int64_t k, int64_t n, f32x16* tile) const {
    if (neighbours) {
      const T* p = base + starts[0] + k * step;
      for (int64_t i = 0; i < n; i++, p += step)
        tile[i] = rows == W ? load(p) : load(p, rows);
    } else if (step == 1) {
      i32x16 turned[W] = {};
      for (int64_t r = 0; r < rows; r++) {
        const T* p = base + starts[r] + k;
        turned[r] = as_int(n == W ? load(p) : load(p, n));
      }
      transpose(turned);
      for (int64_t i = 0; i < n; i++) tile[i] = as_float(turned[i]);
    } else {
      float buffer[W * W] = {};
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++)
          buffer[i * W + r] = to_float(base[starts[r] + (k + i) * step]);
      for (int64_t i = 0; i < n; i++) tile[i] = load(buffer + i * W);
    }
  }
  void store_tile(int64_t k, int64_t n, const f32x16* tile) const {
    if (neighbours) {
      T* p = base + starts[0] + k * step;
      for (int64_t i = 0; i < n; i++, p += step) {
        if (rows == W) store(p, tile[i]);
        else store(p, tile[i], rows);
      }
    } else if (step == 1) {
      i32x16 turned[W] = {};
      for (int64_t i = 0; i < n; i++) turned[i] = as_int(tile[i]);
      transpose(turned);
      for (int64_t r = 0; r < rows; r++) {
        T* p = base + starts[r] + k;
        if (n == W) store(p, as_float(turned[r]));
        else store(p, as_float(turned[r]), n);
      }
    } else {
      float buffer[W * W];
      for (int64_t i = 0; i < n; i++) store_raw(buffer + i * W, tile[i]);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++)
          base[starts[r] + (k + i) * step] = from_float<T>(buffer[i * W + r]);
    }
  }
};

template <template <class> class Op, class S, class T>
void scan_strip(const Strip<const S>& x, const Strip<T>& y, int64_t K) {
  if (x.rows < W / 4) {
    for (int64_t r = 0; r < x.rows; r++) {
      const S* from = x.base + x.starts[r];
      T* to = y.base + y.starts[r];
      Op<double> op;
      for (int64_t k = 0; k < K; k++)
        to[k * y.step] = from_float<T>((float)op.step(to_float(from[k * x.step])));
    }
    return;
  }
  Lanes16<Op> op;
  f32x16 tile[W];
  for (int64_t k = 0; k < K; k += W) {
    const int64_t n = std::min(W, K - k);
    x.load_tile(k, n, tile);
    for (int64_t i = 0; i < n; i++) tile[i] = op.step(tile[i]);
    y.store_tile(k, n, tile);
  }
}

template <template <class> class Op>
Tensor scan(const Tensor& self, int64_t dim, ScalarType type) {
  const Tensor out = empty(self, sizes(self), type);
  if (out.numel() == 0) return out;
  Axes row, kept, out_kept;
  int64_t step = out.numel(), inner = 1;
  for (int64_t d = 0; d < self.dim(); d++) {
    step /= self.size(d);
    if (d == dim) inner = step;
    (d == dim ? row : kept).add(self.size(d), self.stride(d));
    if (d != dim) out_kept.add(self.size(d), step);
  }
  const int64_t K = row.numel(), rows = kept.numel();
  // Strips end where rows cease to be neighbours, unless they would be too narrow.
  const int64_t span = inner < W / 4 ? rows : inner, strips = (span + W - 1) / W;
  dispatch(self.scalar_type(), [&](auto s) {
    const auto* x = data<decltype(s)>(self);
    dispatch(type, [&](auto t) {
      auto* y = mutable_data<decltype(t)>(out);
      parallel(rows / span * strips, 8 * K * W, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const int64_t at = i % strips * W, n = std::min(W, span - at);
          scan_strip<Op>(Strip(x, kept, i / strips * span + at, n, row.inner_stride()),
                         Strip(y, out_kept, i / strips * span + at, n, inner), K);
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("cumsum", TORCH_BOX(&scan<Sum>));
  m.impl("cumprod", TORCH_BOX(&scan<Product>));
  m.impl("logcumsumexp", TORCH_BOX(&scan<LogSumExp>));
}

}  // namespace bic::simd
