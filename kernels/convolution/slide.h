// Where the windows of a convolution lie, and the image laid out so that a tap is an offset.
//
// A convolution is one Slide an axis. A transposed one with stride s is s of them: the outputs
// r, r + s, r + 2s, ... meet the same taps, and no others.
#ifndef BICOMPILE_CONVOLUTION_SLIDE_H
#define BICOMPILE_CONVOLUTION_SLIDE_H

#include <array>
#include <numeric>

#include "../common/tensor.h"

namespace bic::simd {

// Position p < count reads, with its tap t < taps, element start + p * step + t * tap_step of the
// image, which is 0 outside [0, size). The tap is number first_tap + t * next_tap of the weights,
// the output number first + p * next of the result.
struct Slide {
  int64_t count = 1, taps = 1, start = 0, step = 1, tap_step = 1, size = 1;
  int64_t first_tap = 0, next_tap = 1, first = 0, next = 1;

  // The image along this axis begins with element `low` and is cut into `step` classes of every
  // step-th element; a window reads neighbours in the class of its tap.
  int64_t low() const { return start + std::min<int64_t>(0, (taps - 1) * tap_step); }
  int64_t offset(int64_t t) const { return start + t * tap_step - low(); }
  int64_t length() const {
    return taps ? count + std::max(offset(0), offset(taps - 1)) / step : count;
  }
  std::vector<int64_t> classes() const {
    std::vector<int64_t> found;
    for (int64_t t = 0; t < taps; t++) found.push_back(offset(t) % step);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
  }
  bool in_place() const { return step == 1 && low() == 0 && length() == size; }
};

inline Slide forward_slide(int64_t size, int64_t taps, int64_t count, int64_t stride,
                           int64_t padding, int64_t dilation) {
  Slide s;
  s.count = count, s.taps = taps, s.size = size;
  s.start = -padding, s.step = stride, s.tap_step = dilation;
  return s;
}

// The outputs r, r + stride, ... of a transposed convolution with `total` outputs.
inline Slide transposed_slide(int64_t size, int64_t taps, int64_t total, int64_t stride,
                              int64_t padding, int64_t dilation, int64_t r) {
  Slide s;
  s.count = (total - r + stride - 1) / stride, s.size = size;
  s.first = r, s.next = stride;
  s.next_tap = stride / std::gcd(stride, dilation);
  s.tap_step = -(s.next_tap * dilation / stride);
  while (s.first_tap < taps && (r + padding - s.first_tap * dilation) % stride) s.first_tap++;
  s.taps = (taps - s.first_tap + s.next_tap - 1) / s.next_tap;
  s.start = s.taps ? (r + padding - s.first_tap * dilation) / stride : 0;
  return s;
}

// A run of neighbouring outputs in a vector: its first column, how many, where the first one goes.
struct Run {
  int64_t column, count, to;
};

// memcpy without a call, for lines of an image.
BIC_INLINE void copy_short(void* to, const void* from, int64_t bytes) {
  char* t = (char*)to;
  const char* f = (const char*)from;
  const auto both_ends = [&]<int N>() {
    std::memcpy(t, f, N);
    std::memcpy(t + bytes - N, f + bytes - N, N);
  };
  if (bytes >= 32) {
    for (int64_t i = 0; i + 32 <= bytes; i += 32) std::memcpy(t + i, f + i, 32);
    std::memcpy(t + bytes - 32, f + bytes - 32, 32);
  } else if (bytes >= 16) both_ends.template operator()<16>();
  else if (bytes >= 8) both_ends.template operator()<8>();
  else if (bytes >= 4) both_ends.template operator()<4>();
  else if (bytes >= 2) both_ends.template operator()<2>();
}

// Lanes [column, column + count) of v to p.
template <class T>
BIC_INLINE void store_lanes(T* p, f32x16 v, int64_t column, int64_t count) {
#if defined(__AVX512F__)
  const __mmask16 lanes = (__mmask16)(first_bits(count) << column);
  if constexpr (std::is_same_v<T, float>) {
    v = select(v == v, v, as_float(splat_int(0x7fc00000)));
    _mm512_mask_storeu_ps(p - column, lanes, (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p - column, lanes, narrow(v, T{}));
  }
#else
  T buffer[W];
  store(buffer, v);
  std::memcpy((void*)p, buffer + column, count * sizeof(T));
#endif
}

// Three axes, the image of a channel as [classes][z][y][x], and the vectors that cover all outputs.
// Column n of a vector is n elements on in memory, whatever row it lies in; a vector that ends one
// row and begins the next holds elements that are no output, and only those in `runs` are stored.
class Windows {
 public:
  std::array<Slide, 3> axis;
  std::vector<int64_t> taps;              // of each tap: its offset in the image
  std::vector<int64_t> numbers;           // of each tap: its place in the weights
  std::vector<int64_t> vectors;           // first column of each
  std::vector<std::vector<Run>> runs;     // of each vector
  int64_t channel = 1, columns = 0;       // elements of a channel; one past the last column
  bool in_place = true;

  Windows(const std::array<Slide, 3>& slides, const std::array<int64_t, 3>& kernel,
          const std::array<int64_t, 3>& result)
      : axis(slides) {
    for (int d = 0; d < 3; d++) {
      length_[d] = axis[d].length();
      classes_[d] = axis[d].classes();
      in_place = in_place && axis[d].in_place();
      channel *= length_[d] * std::max<int64_t>(classes_[d].size(), 1);
    }
    const auto rank = [&](int d, int64_t t) {
      const auto& c = classes_[d];
      return std::lower_bound(c.begin(), c.end(), axis[d].offset(t) % axis[d].step) - c.begin();
    };
    const int64_t plane = length_[0] * length_[1] * length_[2];
    for (int64_t z = 0; z < axis[0].taps; z++)
      for (int64_t y = 0; y < axis[1].taps; y++)
        for (int64_t x = 0; x < axis[2].taps; x++) {
          const int64_t t[3] = {z, y, x};
          int64_t which = 0, at = 0, number = 0;
          for (int d = 0; d < 3; d++) {
            which = which * classes_[d].size() + rank(d, t[d]);
            at = at * length_[d] + axis[d].offset(t[d]) / axis[d].step;
            number = number * kernel[d] + axis[d].first_tap + t[d] * axis[d].next_tap;
          }
          taps.push_back(which * plane + at);
          numbers.push_back(number);
        }
    cover(result);
  }

  // A channel of the image, as `channel` elements of `to`.
  template <class T>
  void lay_out(const T* image, T* to) const {
    const int64_t rows = axis[1].size, width = axis[2].size;
    std::memset((void*)to, 0, channel * sizeof(T));
    for (int64_t cz : classes_[0])
      for (int64_t cy : classes_[1])
        for (int64_t cx : classes_[2]) {
          const auto [z0, z1] = inside(0, cz);
          const auto [y0, y1] = inside(1, cy);
          const auto [x0, x1] = inside(2, cx);
          for (int64_t z = z0; z < z1; z++)
            for (int64_t y = y0; y < y1; y++) {
              const T* row = image + (element(0, cz, z) * rows + element(1, cy, y)) * width;
              T* line = to + (z * length_[1] + y) * length_[2];
              if (axis[2].step == 1)
                copy_short(line + x0, row + element(2, cx, x0), (x1 - x0) * sizeof(T));
              else
                for (int64_t x = x0; x < x1; x++) line[x] = row[element(2, cx, x)];
            }
          to += length_[0] * length_[1] * length_[2];
        }
  }

 private:
  std::array<int64_t, 3> length_;
  std::array<std::vector<int64_t>, 3> classes_;

  // The element of the image at a position of a class, and the positions of those that exist.
  int64_t element(int d, int64_t of_class, int64_t position) const {
    return axis[d].low() + of_class + position * axis[d].step;
  }
  std::array<int64_t, 2> inside(int d, int64_t of_class) const {
    const Slide& s = axis[d];
    const int64_t low = s.low() + of_class, n = length_[d];
    const auto before = [&](int64_t i) {  // positions whose element is below i
      return i <= low ? 0 : std::min((i - low + s.step - 1) / s.step, n);
    };
    const int64_t begin = before(0);
    return {begin, std::max(begin, before(s.size))};
  }

  // Vectors begin at outputs, and each output is in one vector.
  void cover(const std::array<int64_t, 3>& result) {
    const int64_t area = length_[1] * length_[2], width = length_[2];
    int64_t next = 0;  // the first column that no vector covers
    for (int64_t z = 0; z < axis[0].count; z++)
      for (int64_t y = 0; y < axis[1].count; y++) {
        const int64_t row = z * area + y * width, end = row + axis[2].count;
        const int64_t to = (axis[0].first + z * axis[0].next) * result[1];
        const int64_t line = (to + axis[1].first + y * axis[1].next) * result[2] + axis[2].first;
        for (int64_t n = row; n < end;) {
          if (n >= next) {
            vectors.push_back(n);
            runs.emplace_back();
            next = n + W;
          }
          const int64_t stop = std::min(end, next), at = line + (n - row) * axis[2].next;
          add_run(runs.back(), {n - vectors.back(), stop - n, at});
          n = stop;
        }
        columns = end;
      }
  }
  void add_run(std::vector<Run>& of, const Run& run) const {
    Run* last = of.empty() ? nullptr : &of.back();
    const bool adjacent = last && last->column + last->count == run.column &&
                          last->to + last->count == run.to && axis[2].next == 1;
    if (adjacent) last->count += run.count;
    else of.push_back(run);
  }
};

}  // namespace bic::simd

#endif
