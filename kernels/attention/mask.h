// The attention mask: which keys a row sees, and what is added to their scores.
#ifndef BICOMPILE_ATTENTION_MASK_H
#define BICOMPILE_ATTENTION_MASK_H

#include "../common/tensor.h"

namespace bic::simd {

// The weight of a masked key: adds nothing to a sum, and is told from an exp that is 0 by its sign.
constexpr float kMasked = -0.f;

// Keys [begin, end).
struct Keys {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  Keys join(Keys o) const {
    if (empty()) return o;
    return o.empty() ? *this : Keys{std::min(begin, o.begin), std::max(end, o.end)};
  }
  Keys meet(Keys o) const { return {std::max(begin, o.begin), std::min(end, o.end)}; }
};

// A mask broadcast to [B, H, Q, S], or none: bool (true = seen), additive, or int32 (0 = not seen,
// else the number of the key in its row, from 1, which changes nothing here).
class Mask {
 public:
  Mask(const std::optional<Tensor>& mask, int64_t keys) : keys_(keys) {
    if (!mask) return;
    tensor_ = mask->scalar_type() == ScalarType::Double
                  ? torch::stable::to(*mask, ScalarType::Float) : *mask;
    type_ = tensor_->scalar_type();
    p_ = tensor_->const_data_ptr();
    for (int64_t i = 0; i < 4; i++) {
      const int64_t d = tensor_->dim() - 4 + i;
      if (d < 0) continue;
      STD_TORCH_CHECK(i < 3 || tensor_->size(d) == 1 || tensor_->size(d) == keys,
                      "sdpa: the mask has another number of keys");
      if (tensor_->size(d) > 1) size_[i] = tensor_->size(d), stride_[i] = tensor_->stride(d);
    }
    find_ranges();
  }
  bool given() const { return p_ != nullptr; }
  bool per_head() const { return size_[1] > 1; }

  // The keys from the first to the last that row (b, h, q) sees.
  Keys range(int64_t b, int64_t h, int64_t q) const {
    return given() ? ranges_[row(b, h, q)] : Keys{0, keys_};
  }

  // What is added to the scores of keys j to j + n: -inf where a key is not seen.
  void fill(int64_t b, int64_t h, int64_t q, int64_t j, int64_t n, float* out) const {
    const int64_t at =
        b % size_[0] * stride_[0] + h % size_[1] * stride_[1] + q % size_[2] * stride_[2];
    if (type_ == ScalarType::Bool) {
      copy(static_cast<const uint8_t*>(p_) + at, j, n, out,
           [](uint8_t seen) { return seen ? 0.f : -INFINITY; });
    } else if (type_ == ScalarType::Int) {
      copy(static_cast<const int32_t*>(p_) + at, j, n, out,
           [](int32_t number) { return number ? 0.f : -INFINITY; });
    } else {
      dispatch(type_, [&](auto t) {
        using T = decltype(t);
        copy(static_cast<const T*>(p_) + at, j, n, out, [](T x) { return to_float(x); });
      });
    }
  }

 private:
  int64_t row(int64_t b, int64_t h, int64_t q) const {
    return (b % size_[0] * size_[1] + h % size_[1]) * size_[2] + q % size_[2];
  }
  template <class T, class F>
  void copy(const T* p, int64_t j, int64_t n, float* out, const F& value) const {
    const int64_t step = stride_[3];
    if (step == 1) for (int64_t i = 0; i < n; i++) out[i] = value(p[j + i]);
    else for (int64_t i = 0; i < n; i++) out[i] = value(p[(j + i) * step]);
  }

  void find_ranges() {
    ranges_.resize(size_[0] * size_[1] * size_[2]);
    parallel(ranges_.size(), keys_ / 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        ranges_[i] = find(i / size_[2] / size_[1], i / size_[2] % size_[1], i % size_[2]);
    });
  }
  // Looks from both ends, a block at a time.
  Keys find(int64_t b, int64_t h, int64_t q) const {
    constexpr int64_t kBlock = 64;
    float t[kBlock];
    int64_t begin = 0, end = keys_;
    while (begin < end) {
      const int64_t n = std::min(kBlock, end - begin);
      fill(b, h, q, begin, n, t);
      int64_t i = 0;
      while (i < n && t[i] == -INFINITY) i++;
      begin += i;
      if (i < n) break;
    }
    while (begin < end) {
      const int64_t n = std::min(kBlock, end - begin);
      fill(b, h, q, end - n, n, t);
      int64_t i = n;
      while (i > 0 && t[i - 1] == -INFINITY) i--;
      end -= n - i;
      if (i > 0) break;
    }
    return {begin, end};
  }

  int64_t keys_;
  std::optional<Tensor> tensor_;
  ScalarType type_ = ScalarType::Bool;
  const void* p_ = nullptr;
  int64_t size_[4] = {1, 1, 1, 1}, stride_[4] = {0, 0, 0, 0};
  std::vector<Keys> ranges_;
};

}  // namespace bic::simd

#endif
