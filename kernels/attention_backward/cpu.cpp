// The gradient of sdpa, in the order of kernels/attention_backward: nothing but inputs is kept.
#include <type_traits>

#include "../attention/mask.h"
#include "../attention/products.h"
#include "../common/wide.h"

namespace bic::simd {
namespace {

// [B, H, N, D], read a head at a time.
template <class T>
struct Heads {
  const T* p;
  int64_t stride[4], size, padded;

  explicit Heads(const Tensor& t)
      : p(data<T>(t)), size(t.size(3)), padded(round_up(t.size(3), W)) {
    for (int d = 0; d < 4; d++) stride[d] = t.stride(d);
  }
  const T* row(int64_t b, int64_t h, int64_t n) const {
    return p + b * stride[0] + h * stride[1] + n * stride[2];
  }
  // A row as floats, with zeros up to its padded size; whether all are finite.
  bool widen(int64_t b, int64_t h, int64_t n, float* out) const {
    const T* from = row(b, h, n);
    bool finite = true;
    for (int64_t d = 0; d < padded; d++) {
      out[d] = d < size ? to_float(from[d]) : 0.f;
      finite = finite && std::isfinite(out[d]);
    }
    return finite;
  }
};

// Rows of floats side by side: as rows, and turned into a panel.
struct Block {
  int64_t padded;
  Scratch<float> rows, panel;
  bool finite = true;

  explicit Block(int64_t p) : padded(p), rows(kPanel * p), panel(kPanel * p) {}
  template <class F>  // widen(i, out) for each of n rows
  void read(int64_t n, int64_t size, bool turned, const F& widen) {
    finite = true;
    for (int64_t i = 0; i < n; i++) finite = widen(i, rows + i * padded) && finite;
    if (turned) pack_keys((const float*)rows, padded, n, size, panel);
  }
};

// out[m] += sum over i of w[m][i] * x[i], one chain in double: products are exact.
template <int MR>
BIC_INLINE void wide_tile(const float* w, int64_t ld, const float* x, int64_t stride, int64_t count,
                          double* out) {
  f64x16 acc[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) std::memcpy(&acc[m], out + m * stride, sizeof(acc[m]));
  for (int64_t i = 0; i < count; i++) {
    const f64x16 v = wide(load(x + i * stride));
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) acc[m] = acc[m] + wide((double)w[m * ld + i]) * v;
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; m++) std::memcpy(out + m * stride, &acc[m], sizeof(acc[m]));
}
inline void add_products(const float* w, int64_t ld, int64_t n, const float* x, int64_t stride,
                         int64_t count, double* out) {
  for (int64_t d = 0; d < stride; d += W) {
    int64_t m = 0;
    for (; m + 4 <= n; m += 4)
      wide_tile<4>(w + m * ld, ld, x + d, stride, count, out + m * stride + d);
    for (; m < n; m++) wide_tile<1>(w + m * ld, ld, x + d, stride, count, out + m * stride + d);
  }
}
inline void add_products(const float* w, int64_t ld, int64_t n, const float* x, int64_t stride,
                         int64_t count, float* out) {
  const Scratch<float> sums(n * (stride / W));
  std::fill_n((float*)sums, n * (stride / W), 0.f);
  values(w, ld, n, x, stride, count, stride, out, stride, (float*)sums);
}

template <class T>
class Gradients {
  // Sums of what is rounded to half types may be float32; those of float32 are rounded once.
  using Sum = std::conditional_t<std::is_same_v<T, float>, double, float>;

 public:
  Gradients(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
            const Tensor& dq, const Tensor& dk, const Tensor& dv, const Mask& mask, bool causal,
            float scale)
      : grad_(grad), q_(q), k_(k), v_(v), dq_(mutable_data<T>(dq)), dk_(mutable_data<T>(dk)),
        dv_(mutable_data<T>(dv)), mask_(mask), causal_(causal), scale_(scale), B_(q.size(0)),
        H_(q.size(1)), Q_(q.size(2)), G_(k.size(1)), S_(k.size(2)), group_(H_ / G_),
        rows_(Q_ * group_), top_(B_ * G_ * rows_), sum_(B_ * G_ * rows_), dot_(B_ * G_ * rows_) {}

  void run() {
    const int64_t D = q_.size + v_.size;
    constexpr int64_t kRows = 64, kScores = 1 << 19;
    const int64_t count = std::clamp<int64_t>(kScores / std::max<int64_t>(S_, 1), 1, kRows);
    const int64_t blocks = (rows_ + count - 1) / count, panels = (S_ + kPanel - 1) / kPanel;
    parallel(B_ * G_ * blocks, count * S_ * D / 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = blocks - 1 - i % blocks, head = i / blocks;  // long causal rows first
        queries(head / G_, head % G_, at * count, std::min(rows_, (at + 1) * count));
      }
    });
    parallel(B_ * G_ * panels, rows_ * kPanel * D / 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        keys(i / panels / G_, i / panels % G_, i % panels * kPanel);
    });
  }

 private:
  // Row i of a group: its queries in order, the heads of each innermost.
  int64_t query(int64_t i) const { return i / group_; }
  int64_t head(int64_t kh, int64_t i) const { return kh * group_ + i % group_; }
  Keys seen(int64_t b, int64_t kh, int64_t i) const {
    const int64_t end = causal_ ? std::min(S_, query(i) + 1) : S_;
    return mask_.range(b, head(kh, i), query(i)).meet({0, end});
  }
  Keys seen(int64_t b, int64_t kh, int64_t r0, int64_t r1) const {
    if (!mask_.given()) return seen(b, kh, r1 - 1);
    Keys all{0, 0};
    for (int64_t i = r0; i < r1; i++) all = all.join(seen(b, kh, i));
    return all;
  }
  bool widen_query(int64_t b, int64_t kh, int64_t i, float* out) const {
    return q_.widen(b, head(kh, i), query(i), out);
  }
  bool widen_grad(int64_t b, int64_t kh, int64_t i, float* out) const {
    return grad_.widen(b, head(kh, i), query(i), out);
  }

  // ---- rows [r0, r1) of a group: their gradients, and what the keys need to know of them

  void queries(int64_t b, int64_t kh, int64_t r0, int64_t r1) {
    const int64_t n = r1 - r0, at = (b * G_ + kh) * rows_ + r0;
    const Keys range = seen(b, kh, r0, r1);
    const int64_t start = range.empty() ? 0 : range.begin / kPanel * kPanel;
    const int64_t end = range.empty() ? 0 : range.end, ld = round_up(end - start, kPanel) + W;
    const Scratch<float> s(n * ld), t(n * ld), x(n * q_.padded), y(n * v_.padded);
    const Scratch<Sum> o(n * q_.padded);
    for (int64_t i = 0; i < n; i++) {
      widen_query(b, kh, r0 + i, x + i * q_.padded);
      widen_grad(b, kh, r0 + i, y + i * v_.padded);
    }
    Block key(q_.padded), value(v_.padded);
    for (int64_t j = start; j < end; j += kPanel) {
      const int64_t count = std::min(kPanel, S_ - j);
      pack_keys(k_.row(b, kh, j), k_.stride[2], count, q_.size, key.panel);
      pack_keys(v_.row(b, kh, j), v_.stride[2], count, v_.size, value.panel);
      scores(x, q_.padded, n, key.panel, q_.size, s + (j - start), ld);
      scores(y, v_.padded, n, value.panel, v_.size, t + (j - start), ld);
    }
    const Scratch<float> mask(ld);
    for (int64_t i = 0; i < n; i++) {
      const Keys own = seen(b, kh, r0 + i);
      if (mask_.given()) mask_.fill(b, head(kh, r0 + i), query(r0 + i), start, end - start, mask);
      const int64_t stop = own.empty() ? 0 : own.end - start;
      top_[at + i] = weigh(s + i * ld, ld - W, stop, mask_.given() ? (float*)mask : nullptr);
    }
    totals(s, t, ld, n, end - start, sum_ + at, dot_ + at);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < ld - W; j += W)
        store_raw(s + i * ld + j, slope(load(s + i * ld + j), load(t + i * ld + j),
                                        splat(sum_[at + i]), splat(dot_[at + i])));
    std::fill_n((Sum*)o, n * q_.padded, Sum{0});
    for (int64_t j = start; j < end; j += kPanel) {
      const int64_t count = std::min(kPanel, end - j);
      key.read(count, q_.size, false, [&](int64_t i, float* out) {
        return k_.widen(b, kh, j + i, out);
      });
      add(s + (j - start), ld, n, key, count, o);
    }
    for (int64_t i = 0; i < n; i++) {
      T* out = dq_ + ((b * Q_ + query(r0 + i)) * H_ + head(kh, r0 + i)) * q_.size;
      write(o + i * q_.padded, q_.size, out);
    }
  }

  // Scores to weights exp(s - max), in place; kMasked where a key is not seen. Returns the maximum.
  float weigh(float* s, int64_t n, int64_t end, const float* mask) const {
    f32x16 top = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += W) {
      const i32x16 in = first(std::clamp<int64_t>(end - j, 0, W));
      const f32x16 x = masked(load(s + j), in, mask ? load(mask + j) : zero());
      store_raw(s + j, x);
      top = max_or_skip(x, top);
    }
    const float max = max_lane(top), centre = max == -INFINITY ? 0.f : max;
    for (int64_t j = 0; j < n; j += W) store_raw(s + j, weight(load(s + j), splat(centre)));
    return centre;
  }
  // A score as it enters the softmax: -inf where a key is not seen.
  f32x16 masked(f32x16 s, i32x16 in, f32x16 mask) const {
    const f32x16 none = splat(-INFINITY), x = s * splat(scale_);
    return select(in & (mask != none), mask_.given() ? x + mask : x, none);
  }
  f32x16 weight(f32x16 x, f32x16 centre) const {
    return select(x == splat(-INFINITY), splat(kMasked), exp(x - centre));
  }
  // Whether the bits are those of -0, the least of all integers.
  static i32x16 hidden(f32x16 p) { return as_int(p) < splat_int(as_word(kMasked) + 1); }
  static int32_t as_word(float x) { return bit_cast<int32_t>(x); }

  // sum p and sum p * t / sum p over the keys, one chain each in double, for 8 rows at a time.
  static void totals(const float* p, const float* t, int64_t ld, int64_t n, int64_t keys,
                     float* sum, float* dot) {
    constexpr int64_t kLanes = 8;
    for (int64_t i = 0; i < n; i += kLanes) {
      double a[kLanes] = {}, b[kLanes] = {};
      const int64_t m = std::min(kLanes, n - i);
      for (int64_t j = 0; j < keys; j++)
        for (int64_t r = 0; r < m; r++) {
          const float w = p[(i + r) * ld + j];
          if (as_word(w) == as_word(kMasked)) continue;
          a[r] += w;
          b[r] += (double)w * t[(i + r) * ld + j];
        }
      for (int64_t r = 0; r < m; r++) {
        sum[i + r] = a[r] == 0.0 ? 1.f : (float)a[r];
        dot[i + r] = a[r] == 0.0 ? 0.f : (float)(b[r] / a[r]);
      }
    }
  }

  // The gradient of a score: p / sum * (t - dot) * scale; kMasked where the key is not seen.
  f32x16 slope(f32x16 p, f32x16 t, f32x16 sum, f32x16 dot) const {
    const f32x16 d = p / sum * (t - dot) * splat(scale_) + zero();
    return select(hidden(p), splat(kMasked), d);
  }

  // out[m] += sum over i of w[m][i] * x[i], one chain from the first row of x on.
  static void add(const float* w, int64_t ld, int64_t n, const Block& x, int64_t count, Sum* out) {
    if (x.finite) return add_products(w, ld, n, x.rows, x.padded, count, out);
    for (int64_t m = 0; m < n; m++)  // what is not seen may be NaN or infinite: it is not touched
      for (int64_t i = 0; i < count; i++)
        if (as_word(w[m * ld + i]) != as_word(kMasked))
          add_products(w + m * ld + i, ld, 1, x.rows + i * x.padded, x.padded, 1,
                       out + m * x.padded);
  }

  static void write(const Sum* o, int64_t size, T* out) {
    float t[W];
    for (int64_t d = 0; d < size; d += W) {
      for (int64_t i = 0; i < W; i++) t[i] = (float)o[d + i];
      store(out + d, load(t) + zero(), std::min(W, size - d));
    }
  }

  // ---- keys [j0, j0 + 64): sums over all rows of the group

  void keys(int64_t b, int64_t kh, int64_t j0) const {
    const int64_t count = std::min(kPanel, S_ - j0);
    Block k(q_.padded), v(v_.padded), q(q_.padded), g(v_.padded);
    k.read(count, q_.size, false, [&](int64_t i, float* out) {
      return k_.widen(b, kh, j0 + i, out);
    });
    v.read(count, v_.size, false, [&](int64_t i, float* out) {
      return v_.widen(b, kh, j0 + i, out);
    });
    const Scratch<Sum> dk(kPanel * q_.padded), dv(kPanel * v_.padded);
    std::fill_n((Sum*)dk, kPanel * q_.padded, Sum{0});
    std::fill_n((Sum*)dv, kPanel * v_.padded, Sum{0});
    const Scratch<float> s(kPanel * kPanel), t(kPanel * kPanel);
    for (int64_t r = 0; r < rows_; r += kPanel) {
      const int64_t n = std::min(kPanel, rows_ - r);
      if (seen(b, kh, r, r + n).meet({j0, j0 + count}).empty()) continue;
      q.read(n, q_.size, true, [&](int64_t i, float* out) {
        return widen_query(b, kh, r + i, out);
      });
      g.read(n, v_.size, true, [&](int64_t i, float* out) {
        return widen_grad(b, kh, r + i, out);
      });
      scores(k.rows, q_.padded, count, q.panel, q_.size, s, kPanel);
      scores(v.rows, v_.padded, count, g.panel, v_.size, t, kPanel);
      turned(b, kh, r, n, j0, count, s, t);
      add(s, kPanel, count, g, n, dv);
      add(t, kPanel, count, q, n, dk);
    }
    for (int64_t j = 0; j < count; j++) {
      const int64_t at = (b * S_ + j0 + j) * G_ + kh;
      write(dk + j * q_.padded, q_.size, dk_ + at * q_.size);
      write(dv + j * v_.padded, v_.size, dv_ + at * v_.size);
    }
  }

  // s, t [key][row] from products to weights and slopes: number for number those of `queries`.
  void turned(int64_t b, int64_t kh, int64_t r0, int64_t n, int64_t j0, int64_t count, float* s,
              float* t) const {
    const int64_t at = (b * G_ + kh) * rows_ + r0;
    float top[kPanel] = {}, sum[kPanel], dot[kPanel] = {}, mask[kPanel * kPanel], line[kPanel];
    std::fill_n(sum, kPanel, 1.f);
    std::copy_n(top_ + at, n, top);
    std::copy_n(sum_ + at, n, sum);
    std::copy_n(dot_ + at, n, dot);
    for (int64_t i = 0; i < kPanel; i++) {
      Keys own = i < n ? seen(b, kh, r0 + i).meet({j0, j0 + count}) : Keys{0, 0};
      if (own.empty()) own = {0, 0};
      if (i < n && mask_.given())
        mask_.fill(b, head(kh, r0 + i), query(r0 + i), j0, count, line);
      else std::fill_n(line, kPanel, 0.f);
      for (int64_t j = 0; j < count; j++)
        mask[j * kPanel + i] = own.begin <= j0 + j && j0 + j < own.end ? line[j] : -INFINITY;
    }
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < kPanel; i += W) {
        const int64_t k = j * kPanel + i;
        const f32x16 p = weight(masked(load(s + k), first(W), load(mask + k)), load(top + i));
        const f32x16 total = load(sum + i);
        store_raw(t + k, slope(p, load(t + k), total, load(dot + i)));
        store_raw(s + k, select(hidden(p), p, p / total));
      }
  }

  const Heads<T> grad_, q_, k_, v_;
  T *dq_, *dk_, *dv_;
  const Mask& mask_;
  bool causal_;
  float scale_;
  int64_t B_, H_, Q_, G_, S_, group_, rows_;
  Scratch<float> top_, sum_, dot_;  // of each row: centre, sum of weights, sum of weight * t
};

std::tuple<Tensor, Tensor, Tensor> sdpa_backward(const Tensor& grad, const Tensor& query,
                                                 const Tensor& key, const Tensor& value,
                                                 std::optional<Tensor> attn_mask, bool is_causal,
                                                 double scale) {
  const auto like = [](const Tensor& t) {  // the memory of the forward's output
    return empty(t, {t.size(0), t.size(2), t.size(1), t.size(3)});
  };
  const Tensor dq = like(query), dk = like(key), dv = like(value);
  if (dq.numel() == 0 || dk.numel() == 0) {  // nothing meets
    for (const Tensor& t : {dq, dk, dv})
      dispatch(t.scalar_type(), [&](auto x) {
        std::fill_n(mutable_data<decltype(x)>(t), t.numel(), from_float<decltype(x)>(0.f));
      });
  } else {
    STD_TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0,
                    "sdpa_backward: heads do not fit");
    const Tensor g = along_last(grad), q = along_last(query), k = along_last(key),
                 v = along_last(value);
    const Mask mask(attn_mask, key.size(2));
    dispatch(query.scalar_type(), [&](auto t) {
      Gradients<decltype(t)>(g, q, k, v, dq, dk, dv, mask, is_causal, (float)scale).run();
    });
  }
  const auto view = [](const Tensor& t) { return torch::stable::transpose(t, 1, 2); };
  return {view(dq), view(dk), view(dv)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("sdpa_backward", TORCH_BOX(&sdpa_backward));
}

}  // namespace bic::simd
