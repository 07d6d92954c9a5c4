// sdpa: whole rows of scores, exact maximum, one chain over the keys: see kernels/attention.
#include "../common/wide.h"
#include "mask.h"
#include "products.h"

namespace bic::simd {
namespace {

template <class T>
class Attention {
 public:
  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Mask& mask,
            bool causal, float scale, float cap, std::vector<float> sinks)
      : q_(data<T>(q)), k_(data<T>(k)), v_(data<T>(v)), out_(mutable_data<T>(out)), mask_(mask),
        causal_(causal), scale_(scale), cap_(cap), sinks_(std::move(sinks)), B_(q.size(0)),
        H_(q.size(1)), Q_(q.size(2)), D_(q.size(3)), G_(k.size(1)), S_(k.size(2)), Dv_(v.size(3)),
        group_(H_ / G_), Dp_(round_up(D_, W)), Dvp_(round_up(Dv_, W)) {
    for (int d = 0; d < 4; d++) {
      qs_[d] = q.stride(d);
      ks_[d] = k.stride(d);
      vs_[d] = v.stride(d);
    }
  }

  void run() {
    // Rows of a task: a block of queries times the heads of a group; fewer where rows are long.
    constexpr int64_t kRows = 32, kScores = 1 << 19;
    const int64_t rows = std::clamp<int64_t>(kScores / std::max<int64_t>(S_, 1), 1, kRows);
    block_ = std::clamp<int64_t>(rows / group_, 1, Q_);
    const int64_t blocks = (Q_ + block_ - 1) / block_;
    if (blocks > 1) pack_all();
    const int64_t work = block_ * group_ * S_ * (D_ + Dv_) / W;
    parallel(B_ * G_ * blocks, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = blocks - 1 - i % blocks, head = i / blocks;  // long causal rows first
        task(head / G_, head % G_, at * block_, std::min(Q_, (at + 1) * block_));
      }
    });
  }

 private:
  struct Rows {  // a task's rows: queries [q0, q1) of each head of group kh, heads innermost
    int64_t b, kh, q0, q1, count;
    int64_t group;
    int64_t query(int64_t i) const { return q0 + i / group; }
    int64_t head(int64_t i) const { return kh * group + i % group; }
  };

  Keys seen(int64_t b, int64_t h, int64_t q) const {
    return mask_.range(b, h, q).meet({0, causal_ ? std::min(S_, q + 1) : S_});
  }
  Keys seen(const Rows& r) const {
    if (!mask_.given()) return seen(r.b, 0, r.q1 - 1);
    Keys all{0, 0};
    for (int64_t i = 0; i < r.count; i += mask_.per_head() ? 1 : group_)
      all = all.join(seen(r.b, r.head(i), r.query(i)));
    return all;
  }

  // Panels of all keys that some row sees, for tasks to share.
  void pack_all() {
    const int64_t panels = (S_ + kPanel - 1) / kPanel;
    packed_.emplace(B_ * G_ * panels * kPanel * Dp_);
    std::vector<Keys> needed(B_ * G_);
    for (int64_t i = 0; i < B_ * G_; i++)
      needed[i] = seen({i / G_, i % G_, 0, Q_, Q_ * group_, group_});
    parallel(B_ * G_ * panels, kPanel * D_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t head = i / panels, j = i % panels * kPanel;
        if (needed[head].meet({j, j + kPanel}).empty()) continue;
        pack_keys(keys(head / G_, head % G_) + j * ks_[2], ks_[2], std::min(kPanel, S_ - j), D_,
                  *packed_ + i * kPanel * Dp_);
      }
    });
  }

  const T* keys(int64_t b, int64_t kh) const { return k_ + b * ks_[0] + kh * ks_[1]; }
  const T* values_at(int64_t b, int64_t kh) const { return v_ + b * vs_[0] + kh * vs_[1]; }
  T* output(const Rows& r, int64_t i) const {
    return out_ + ((r.b * Q_ + r.query(i)) * H_ + r.head(i)) * Dv_;
  }

  void task(int64_t b, int64_t kh, int64_t q0, int64_t q1) const {
    const Rows r{b, kh, q0, q1, (q1 - q0) * group_, group_};
    const Keys range = seen(r);
    if (range.empty()) {
      for (int64_t i = 0; i < r.count; i++) std::fill_n(output(r, i), Dv_, from_float<T>(0.f));
      return;
    }
    const int64_t start = range.begin / kPanel * kPanel;
    const int64_t lds = round_up(range.end - start, kPanel) + W;
    const Scratch<float> s(r.count * lds), mask(lds), sink(r.count);
    raw_scores(r, start, range.end, s, lds);
    for (int64_t i = 0; i < r.count; i++) {
      if (mask_.given() && (i % group_ == 0 || mask_.per_head()))
        mask_.fill(b, r.head(i), r.query(i), start, range.end - start, mask);
      const int64_t end = causal_ ? std::min(range.end, r.query(i) + 1) : range.end;
      sink[i] = weigh(s + i * lds, lds - W, end - start, mask_.given() ? (float*)mask : nullptr,
                      sinks_.empty() ? -INFINITY : sinks_[r.head(i)]);
    }
    weighted_values(r, range, s + (range.begin - start), lds, sink);
  }

  // The dot products of all rows with keys [start, end).
  void raw_scores(const Rows& r, int64_t start, int64_t end, float* s, int64_t lds) const {
    const Scratch<float> q(r.count * Dp_), panel(packed_ ? 0 : kPanel * Dp_);
    for (int64_t i = 0; i < r.count; i++) {
      const T* from = q_ + r.b * qs_[0] + r.head(i) * qs_[1] + r.query(i) * qs_[2];
      for (int64_t d = 0; d < Dp_; d++) q[i * Dp_ + d] = d < D_ ? to_float(from[d * qs_[3]]) : 0.f;
    }
    const int64_t panels = (S_ + kPanel - 1) / kPanel;
    for (int64_t j = start; j < end; j += kPanel) {
      const float* p = panel;
      if (packed_) p = *packed_ + ((r.b * G_ + r.kh) * panels + j / kPanel) * kPanel * Dp_;
      else pack_keys(keys(r.b, r.kh) + j * ks_[2], ks_[2], std::min(kPanel, S_ - j), D_, panel);
      scores(q, Dp_, r.count, p, D_, s + (j - start), lds);
    }
  }

  // Scores to weights exp(s - max), in place; kMasked where a key is not seen. The sink's weight.
  float weigh(float* s, int64_t n, int64_t end, const float* mask, float sink) const {
    const f32x16 scale = splat(scale_), cap = splat(cap_), none = splat(-INFINITY);
    f32x16 top = splat(sink);
    for (int64_t j = 0; j < n; j += W) {
      const i32x16 in = first(std::clamp<int64_t>(end - j, 0, W));
      f32x16 x = load(s + j) * scale;
      if (cap_ != 0.f) x = tanh(x / cap) * cap;
      if (mask) {
        const f32x16 add = load(mask + j);
        x = select(in & (add != none), x + add, none);
      } else {
        x = select(in, x, none);
      }
      store_raw(s + j, x);
      top = max_or_skip(x, top);
    }
    const float max = max_lane(top);
    const f32x16 centre = splat(max == -INFINITY ? 0.f : max);
    for (int64_t j = 0; j < n; j += W) {
      const f32x16 x = load(s + j);
      store_raw(s + j, select(x == none, splat(kMasked), exp(x - centre)));
    }
    return sink == -INFINITY ? 0.f : max_lane(exp(splat(sink) - centre));
  }

  // `sink`: a weight of each row that has no value; comes last into the sum.
  void weighted_values(const Rows& r, Keys range, const float* p, int64_t ldp,
                       const float* sink) const {
    constexpr int64_t kKeys = 512;  // values of so many keys stay in the cache for all rows
    const int64_t sums = r.count * (Dvp_ / W);
    const Scratch<float> o(r.count * Dvp_), l(sums);
    std::fill_n((float*)o, r.count * Dvp_, 0.f);
    std::fill_n((float*)l, sums, 0.f);
    for (int64_t k = range.begin; k < range.end; k += kKeys)
      values(p + (k - range.begin), ldp, r.count, values_at(r.b, r.kh) + k * vs_[2], vs_[2],
             std::min(kKeys, range.end - k), Dv_, o, Dvp_, l);
    for (int64_t i = 0; i < r.count; i++) {
      const float sum = l[i] + sink[i];
      if (!write(o + i * Dvp_, sum, output(r, i)))
        careful_row(r, i, range, p + i * ldp, sum, o + i * Dvp_);
    }
  }

  // Divides and rounds a row; false where a value is not finite.
  bool write(const float* o, float sum, T* out) const {
    const f32x16 divisor = splat(sum == 0.f ? 1.f : sum);
    bool finite = true;
    for (int64_t d = 0; d < Dv_; d += W) {
      const int64_t n = std::min(W, Dv_ - d);
      const f32x16 x = load(o + d) / divisor + zero();  // + 0: no sign of zero is left to padding
      store(out + d, x, n);
      finite = finite && max_lane(select(abs(x) < splat(INFINITY), zero(), splat(1.f))) == 0.f;
    }
    return finite;
  }

  // A row again, without touching the values of masked keys: they may be NaN or infinite.
  void careful_row(const Rows& r, int64_t i, Keys range, const float* p, float sum,
                   float* o) const {
    std::fill_n(o, Dvp_, 0.f);
    for (int64_t k = range.begin; k < range.end; k++) {
      const float weight = p[k - range.begin];
      if (weight == 0.f && std::signbit(weight)) continue;
      const T* v = values_at(r.b, r.kh) + k * vs_[2];
      for (int64_t d = 0; d < Dv_; d += W) {
        const int64_t n = std::min(W, Dv_ - d);
        store_raw(o + d, fma(splat(weight), load(v + d, n), load(o + d)));
      }
    }
    write(o, sum, output(r, i));
  }

  const T *q_, *k_, *v_;
  T* out_;
  const Mask& mask_;
  bool causal_;
  float scale_, cap_;  // scores beyond the cap are bent to it; 0: there is none
  std::vector<float> sinks_;
  int64_t B_, H_, Q_, D_, G_, S_, Dv_, group_, Dp_, Dvp_, block_ = 1;
  int64_t qs_[4], ks_[4], vs_[4];
  std::optional<Scratch<float>> packed_;
};

// A number for each head as float32; none where there are no sinks.
std::vector<float> sink_of_heads(const std::optional<Tensor>& sinks, int64_t heads) {
  std::vector<float> out;
  if (!sinks) return out;
  STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == heads, "sdpa: a sink for each head");
  const Tensor t = torch::stable::contiguous(torch::stable::to(*sinks, ScalarType::Float));
  return {data<float>(t), data<float>(t) + heads};
}

Tensor sdpa(const Tensor& query, const Tensor& key, const Tensor& value,
            std::optional<Tensor> attn_mask, bool is_causal, double scale, double softcap,
            std::optional<Tensor> sinks) {
  const int64_t B = query.size(0), H = query.size(1), Q = query.size(2), Dv = value.size(3);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() &&
                  value.scalar_type() == query.scalar_type(), "sdpa: dtypes differ");
  Tensor out = empty(query, {B, Q, H, Dv});
  Tensor view = torch::stable::transpose(out, 1, 2);
  if (out.numel() == 0) return view;
  STD_TORCH_CHECK(key.size(1) > 0 && H % key.size(1) == 0, "sdpa: heads do not fit");
  const Tensor k = along_last(key), v = along_last(value);
  const Mask mask(attn_mask, key.size(2));
  dispatch(query.scalar_type(), [&](auto t) {
    Attention<decltype(t)>(query, k, v, out, mask, is_causal, (float)scale, (float)softcap,
                           sink_of_heads(sinks, H)).run();
  });
  return view;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("sdpa", TORCH_BOX(&sdpa));
}

}  // namespace bic::simd
