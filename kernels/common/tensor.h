// Tensors of torch's stable ABI as pointers, sizes and strides; loops over them on torch's threads.
#ifndef BICOMPILE_TENSOR_H
#define BICOMPILE_TENSOR_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace bic::simd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class T>
constexpr ScalarType dtype_of = ScalarType::Float;
template <>
inline constexpr ScalarType dtype_of<bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType dtype_of<f16> = ScalarType::Half;

// Calls f with a value of the element type.
template <class F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(f16{});
    default: STD_TORCH_CHECK(false, "bicompile: dtype is not float32, bfloat16 or float16");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Sizes sizes(const Tensor& t) {
  const auto s = t.sizes();
  return Sizes(s.begin(), s.end());
}
inline Tensor empty(const Tensor& like, const Sizes& size, ScalarType type) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, type);
}
inline Tensor empty(const Tensor& like, const Sizes& size) {
  return empty(like, size, like.scalar_type());
}

// Runs f(begin, end) over [0, n) on torch's threads; `work` is the cost of one item in operations.
template <class F>
void parallel(int64_t n, int64_t work, const F& f) {
  constexpr int64_t kGrain = 32768;
  if (n <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1));
  const auto body = [&](int64_t begin, int64_t end) {
    FloatMode mode;
    f(begin, end);
  };
  if (n <= grain) return body(0, n);
  torch::stable::parallel_for(0, n, grain, body);
}

// Scratch memory of n elements, aligned to a cache line, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : bytes_(new char[n * sizeof(T) + 64]) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) & ~uintptr_t{63});
  }
  operator T*() const { return data_; }

 private:
  std::unique_ptr<char[]> bytes_;
  T* data_;
};

// Axes as (size, stride) pairs, adjacent ones merged where one stride walks both.
class Axes {
 public:
  void add(int64_t size, int64_t stride) {
    numel_ *= size;
    if (size == 1) return;
    if (!size_.empty() && stride_.back() == size * stride) {
      size_.back() *= size;
      stride_.back() = stride;
    } else {
      size_.push_back(size);
      stride_.push_back(stride);
    }
  }
  int64_t numel() const { return numel_; }
  int64_t rank() const { return size_.size(); }
  // Size and stride of the innermost axis.
  int64_t inner_size() const { return size_.empty() ? 1 : size_.back(); }
  int64_t inner_stride() const { return stride_.empty() ? 1 : stride_.back(); }

  // Offset of the element with this index in row-major order.
  int64_t offset(int64_t index) const {
    int64_t sum = 0;
    for (int64_t i = rank() - 1; i > 0; i--) {
      sum += index % size_[i] * stride_[i];
      index /= size_[i];
    }
    return rank() ? sum + index * stride_[0] : 0;
  }

  // Calls f(index, offset) for [begin, end) in row-major order.
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    const int64_t n = inner_size(), step = inner_stride();
    for (int64_t i = begin; i < end;) {
      const int64_t stop = std::min(end, i + n - i % n);
      for (int64_t at = offset(i); i < stop; i++, at += step) f(i, at);
    }
  }

 private:
  Sizes size_, stride_;
  int64_t numel_ = 1;
};

// The axes of a tensor apart: those kept and those in `reduced` (sorted, not negative).
struct Split {
  Axes kept, reduced;
  Sizes shape;  // of the result

  Split(const Tensor& t, const Sizes& dims, bool keepdim) {
    for (int64_t d = 0; d < t.dim(); d++) {
      const bool is_reduced = std::binary_search(dims.begin(), dims.end(), d);
      (is_reduced ? reduced : kept).add(t.size(d), t.stride(d));
      if (!is_reduced) shape.push_back(t.size(d));
      if (is_reduced && keepdim) shape.push_back(1);
    }
  }
};

// n contiguous elements from one type to another.
template <class S, class T>
void convert(const S* p, int64_t n, T* out) {
  int64_t k = 0;
  for (; k + W <= n; k += W) store(out + k, load(p + k));
  if (k < n) store(out + k, load(p + k, n - k), n - k);
}

// Row i of a tensor as contiguous memory of T: in place where it is so, else copied to a buffer.
template <class T>
class Rows {
 public:
  Rows(const Tensor& t, Axes kept, Axes row)
      : base_(t.const_data_ptr()), type_(t.scalar_type()), kept_(std::move(kept)),
        row_(std::move(row)),
        in_place_(type_ == dtype_of<T> && row_.rank() <= 1 && row_.inner_stride() == 1),
        buffer_(in_place_ ? 0 : row_.numel()) {}
  const T* operator[](int64_t i) const {
    const int64_t start = kept_.offset(i);
    if (in_place_) return static_cast<const T*>(base_) + start;
    dispatch(type_, [&](auto s) { copy(static_cast<const decltype(s)*>(base_) + start); });
    return buffer_;
  }

 private:
  template <class S>
  void copy(const S* p) const {
    T* out = buffer_;
    if (row_.rank() <= 1 && row_.inner_stride() == 1) return convert(p, row_.numel(), out);
    row_.each(0, row_.numel(), [&](int64_t k, int64_t at) {
      if constexpr (std::is_same_v<S, T>) out[k] = p[at];
      else out[k] = from_float<T>(to_float(p[at]));
    });
  }

  const void* base_;
  ScalarType type_;
  Axes kept_, row_;
  bool in_place_;
  Scratch<T> buffer_;
};

}  // namespace bic::simd

#endif
