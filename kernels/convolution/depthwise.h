// Depthwise convolutions: an output channel reads one input channel, and 16 channels are a vector.
//
// The image is taken in bands that fit in a cache: some outputs along its outermost axis, of 16
// channels. What their windows read is laid out with its border of zeros, a vector of 16 channels a
// place; a tap is an offset then, whatever the stride, and no line is too short for a vector.
// Results of 16 places are turned on their way out.
#ifndef BICOMPILE_CONVOLUTION_DEPTHWISE_H
#define BICOMPILE_CONVOLUTION_DEPTHWISE_H

#include "channels.h"
#include "direct.h"
#include "slide.h"

namespace bic::simd {

template <class P>
class Depthwise {
 public:
  using T = typename P::Element;

  // Images [B, C, ...], or [B, ..., C] if `last`; weights [C, taps]; results [B, C, ...].
  Depthwise(const std::array<Slide, 3>& slides, int64_t B, int64_t C, bool last)
      : axis_(slides), B_(B), C_(C), last_(last) {
    int64_t length[3];
    for (int d = 0; d < 3; d++) {
      length[d] = std::max(window(d, axis_[d].count), axis_[d].size - axis_[d].start);
      images_ *= axis_[d].size;
      results_ *= axis_[d].count;
    }
    while (banded_ < 2 && length[banded_] == 1) banded_++;
    int64_t stride[3] = {0, 0, W};
    for (int d = 1; d >= 0; d--) stride[d] = stride[d + 1] * length[d + 1];
    const Slide& along = axis_[banded_];
    row_ = stride[banded_];
    const int64_t rows = kBand / (row_ * (int64_t)sizeof(Word)) - window(banded_, 1);
    band_ = std::clamp<int64_t>(rows / along.step + 1, 1, along.count);

    const auto each = [&](int64_t outer, const auto& size, const auto& at) {
      std::vector<int64_t> found;
      std::array<int64_t, 3> n;
      for (int d = 0; d < 3; d++) n[d] = d == banded_ ? outer : d < banded_ ? 1 : size(d);
      for (int64_t z = 0; z < n[0]; z++)
        for (int64_t y = 0; y < n[1]; y++)
          for (int64_t x = 0; x < n[2]; x++)
            found.push_back(at(0, z) * stride[0] + at(1, y) * stride[1] + at(2, x) * stride[2]);
      return found;
    };
    at_ = each(along.taps, [&](int d) { return axis_[d].taps; },
               [&](int d, int64_t t) { return t * axis_[d].tap_step; });
    starts_ = each(band_, [&](int d) { return axis_[d].count; },
                   [&](int d, int64_t p) { return p * axis_[d].step; });
    places_ = each(std::min(along.size, window(banded_, band_)),
                   [&](int d) { return axis_[d].size; },
                   [&](int d, int64_t i) { return d <= banded_ ? i : i - axis_[d].start; });
    starts_.resize(starts_.size() + W, 0);
  }

  // bias may be null.
  void run(const T* images, const T* weights, const T* bias, T* results) const {
    const Slide& along = axis_[banded_];
    const int64_t K = at_.size(), steps = steps_of<P>(K), blocks = (C_ + W - 1) / W;
    const int64_t bands = (along.count + band_ - 1) / band_, line = results_ / along.count;
    const int64_t size = window(banded_, band_) * row_;
    parallel(blocks * B_ * bands, band_ * line * W * (K + W), [&](int64_t begin, int64_t end) {
      const Scratch<Word> weight(steps * W * W), laid(size);
      std::memset(laid, 0, size * sizeof(Word));  // of which the border stays
      int64_t ready = -1;
      for (int64_t i = begin; i < end; i++) {
        const int64_t c = i / (B_ * bands) * W, b = i / bands % B_, p = i % bands * band_;
        const int64_t channels = std::min(W, C_ - c), count = std::min(band_, along.count - p);
        if (ready != c) pack(weights + c * K, channels, weight);
        ready = c;
        const T* image = images + b * C_ * images_ + c * (last_ ? 1 : images_);
        lay_out(image, channels, along.start + p * along.step, window(banded_, count), laid);
        const Band band = {weight, laid, count * line, channels, bias ? bias + c : nullptr,
                           results + (b * C_ + c) * results_ + p * line};
        compute(band);
      }
    });
  }

 private:
  static constexpr int64_t kBand = 1 << 18;  // bytes
  static constexpr int kPlaces = 4;

  // A band of 16 channels or fewer.
  struct Band {
    const Word *weight, *laid;
    int64_t outputs, channels;
    const T* bias;
    T* results;
  };
  // What Direct multiplies: weights [step][lane][16], places with a vector of 16 channels each.
  struct Channels {
    const Word* weights;
    const Word* windows[kPlaces];
    const int64_t* at;
    int64_t K;

    BIC_INLINE auto weight(int, int64_t s, int64_t lane) const {
      return P::Panel::from_words(load_words(weights + (s * W + lane) * W));
    }
    BIC_INLINE auto place(int v, int64_t s, int64_t lane) const {
      const Word* from = windows[v];
      if constexpr (P::kBlock == 16) {
        return P::Panel::from_words(load_words(from + at[s * W + lane]));
      } else {
        const int64_t k = s * 2 * W + 2 * lane;
        const i32x16 low = splat_int(0xffff) & load_words(from + at[k]);
        if (k + 1 == K) return P::Panel::from_words(low);
        const i32x16 high = splat_int((int32_t)0xffff0000) & load_words(from + at[k + 1]);
        return P::Panel::from_words(high | low);
      }
    }
  };

  // Places that `count` windows read along an axis.
  int64_t window(int d, int64_t count) const {
    return (count - 1) * axis_[d].step + (axis_[d].taps - 1) * axis_[d].tap_step + 1;
  }

  // Elements as words: floats, or a bfloat16 in both halves, from which a pair is taken.
  static BIC_INLINE i32x16 word(i32x16 x) {
    return P::kBlock == 16 ? x : x | shift_right_16(x);
  }

  void pack(const T* weights, int64_t channels, Word* to) const {
    const int64_t K = at_.size();
    for (int64_t s = 0; s < steps_of<P>(K); s++, to += W * W) {
      i32x16 t[W];
      for (int i = 0; i < W; i++)
        t[i] = i < channels ? words(weights + i * K, s * P::kBlock, K) : splat_int(0);
      transpose(t);
      for (int i = 0; i < W; i++) store_words(to + i * W, t[i]);
    }
  }

  // Rows [low, low + rows) of the image along the banded axis; those outside are 0.
  void lay_out(const T* image, int64_t channels, int64_t low, int64_t rows, Word* to) const {
    const int64_t size = axis_[banded_].size, width = images_ / size;
    const int64_t begin = std::clamp<int64_t>(-low, 0, rows);
    const int64_t end = std::clamp(size - low, begin, rows);
    std::memset(to, 0, begin * row_ * sizeof(Word));
    std::memset(to + end * row_, 0, (rows - end) * row_ * sizeof(Word));
    to += begin * row_;
    const int64_t first = (low + begin) * width, n = (end - begin) * width;
    if (last_) {
      image += first * C_;
      for (int64_t i = 0; i < n; i++, image += C_)
        store_words(to + places_[i], word(as_int(load_block(image, channels))));
      return;
    }
    for (int64_t i = 0; i < n; i += W) {
      const int64_t places = std::min(W, n - i);
      i32x16 t[W];
      load_square(image + first + i, images_, channels, places, t);
      transpose(t);
      for (int64_t j = 0; j < places; j++) store_words(to + places_[i + j], word(t[j]));
    }
  }

  void compute(const Band& band) const {
    static constexpr auto kWays = []<int... L>(std::integer_sequence<int, L...>) {
      return std::array{&Depthwise::compute_lanes<L + 1>...};
    }(std::make_integer_sequence<int, W>());
    (this->*kWays[lanes_of<P>(at_.size()) - 1])(band);
  }
  template <int L>
  void compute_lanes(const Band& band) const {
    const int64_t K = at_.size();
    const f32x16 added = band.bias ? load_block(band.bias, band.channels) : zero();
    for (int64_t i = 0; i < band.outputs; i += W) {
      alignas(64) float tile[W * W];
      const int64_t n = std::min(W, band.outputs - i);
      for (int64_t j = 0; j < n; j += kPlaces) {
        const int64_t* at = &starts_[i + j];
        const Word* from = band.laid;
        const Channels taps = {
            band.weight, {from + at[0], from + at[1], from + at[2], from + at[3]}, at_.data(), K};
        Direct<P, L, 1, kPlaces, Channels>{taps, K}.run(tile + j * W);
      }
      i32x16 t[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) {
        const f32x16 y = load(tile + j * W);
        t[j] = as_int(band.bias ? y + added : y);
      }
      transpose(t);
      for (int64_t c = 0; c < band.channels; c++)
        store_block(band.results + c * results_ + i, as_float(t[c]), n);
    }
  }

  std::array<Slide, 3> axis_;
  int64_t B_, C_;
  bool last_;
  int banded_ = 0;                          // the outermost axis that is longer than 1
  int64_t images_ = 1, results_ = 1;        // places of an image, of a result
  int64_t row_ = 0, band_ = 0;              // words of a row laid out; outputs of a band along it
  std::vector<int64_t> at_, starts_, places_;  // offsets of taps, windows, places of the image
};

}  // namespace bic::simd

#endif
