// qk_norm_rope: see kernels/rope.
#include "../common/tensor.h"
#include "../norm/rows.h"

namespace bic::simd {
namespace {

struct Norm {
  float eps, offset;
  bool round_first;
};

// One of cos and sin, [B or 1, 1, Q, D]: the row of a token.
template <class T>
class Turns {
 public:
  explicit Turns(const Tensor& t)
      : dense_(t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t),
        base_(data<T>(dense_)), batch_(t.size(0) > 1 ? dense_.stride(0) : 0),
        token_(dense_.stride(2)) {}
  const T* row(int64_t b, int64_t s) const { return base_ + b * batch_ + s * token_; }

 private:
  Tensor dense_;
  const T* base_;
  int64_t batch_, token_;
};

// n * cos + rotate_half(n) * sin, each operation rounded; `turned` is scratch.
template <class T>
void turn(const T* n, const T* cos, const T* sin, int64_t D, T* turned, T* out) {
  const int64_t half = D / 2, front = D - half;
  for (int64_t d = 0; d < D; d++)
    turned[d] = d < front ? from_float<T>(-to_float(n[d + half])) : n[d - front];
  blocks(D, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
    const f32x16 a = rounded(load_block(n + d, count) * load_block(cos + d, count), T{});
    const f32x16 b = rounded(load_block(turned + d, count) * load_block(sin + d, count), T{});
    store_block(out + d, a + b, count);
  });
}

template <class T>
void heads(const Tensor& x, const float* weight, const Turns<T>& cos, const Turns<T>& sin,
           Norm norm, const Tensor& out) {
  const int64_t S = x.size(1), H = x.size(2), D = x.size(3);
  T* y = mutable_data<T>(out);
  Axes kept, row;
  for (int64_t d = 0; d < 3; d++) kept.add(x.size(d), x.stride(d));
  row.add(D, x.stride(3));
  parallel(x.size(0) * S * H, 6 * D, [&](int64_t begin, int64_t end) {
    const Rows<T> rows(x, kept, row);
    const Scratch<T> n(D), turned(D);
    for (int64_t i = begin; i < end; i++) {
      const int64_t token = i / H, b = token / S, s = token % S;
      rms_norm_row<T>(rows[i], D, norm.eps, weight, norm.offset, norm.round_first, n);
      turn<T>(n, cos.row(b, s), sin.row(b, s), D, turned, y + i * D);
    }
  });
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& query, const Tensor& key,
                                        const Tensor& query_weight, const Tensor& key_weight,
                                        const Tensor& cos, const Tensor& sin, double eps,
                                        double offset, bool round_first) {
  const Norm norm{(float)eps, (float)offset, round_first};
  const auto one = [&](const Tensor& x, const Tensor& weight) {
    Tensor out = empty(x, sizes(x));
    if (out.numel() > 0)
      dispatch(x.scalar_type(), [&](auto t) {
        using T = decltype(t);
        const int64_t D = x.size(3);
        const Tensor dense = torch::stable::contiguous(weight);
        const Scratch<float> w(D);
        convert(data<T>(dense), D, static_cast<float*>(w));
        heads<T>(x, w, Turns<T>(cos), Turns<T>(sin), norm, out);
      });
    return torch::stable::transpose(out, 1, 2);
  };
  return {one(query, query_weight), one(key, key_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope)); }

}  // namespace bic::simd
