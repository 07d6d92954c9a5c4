// Few terms, or few outputs a group: nothing is packed, a vector holds 16 outputs of one lane, and
// the lanes meet in registers.
#ifndef BICOMPILE_CONVOLUTION_DIRECT_H
#define BICOMPILE_CONVOLUTION_DIRECT_H

#include "../matmul/panels.h"

namespace bic::simd {

// Lanes that hold terms; the others are +0, and adding one +0 at the end is adding each in turn.
template <class P>
int64_t lanes_of(int64_t K) {
  return std::clamp<int64_t>(P::kBlock == 32 ? (K + 1) / 2 : K, 1, W);
}

// What `count` outputs give to a lane at a step; term k of the first one lies at image[at[k]].
template <class P>
BIC_INLINE i32x16 image_words(const typename P::Element* image, const int64_t* at, int64_t step,
                              int64_t lane, int64_t K, int64_t count) {
  const auto row = [&](int64_t k) __attribute__((always_inline)) {
    if (k >= K) return splat_int(0);
    return as_int(count == W ? load(image + at[k]) : load(image + at[k], count));
  };
  if constexpr (P::kBlock == 16) {
    return row(step * W + lane);
  } else {
    const int64_t k = step * 2 * W + 2 * lane;
    return row(k + 1) | shift_right_16(row(k));
  }
}

// What Direct multiplies for vectors of 16 neighbouring outputs of a channel, all whole if FULL.
template <class P, bool FULL>
struct Neighbours {
  const Word* weights;  // of a channel, word 16 s + l is what lane l takes at step s
  int64_t channel;      // words from one channel to the next
  const typename P::Element* image;
  const int64_t *at, *starts;
  int64_t K, columns;

  BIC_INLINE auto weight(int m, int64_t s, int64_t lane) const {
    return P::Panel::broadcast(weights + m * channel + s * W + lane);
  }
  BIC_INLINE auto place(int v, int64_t s, int64_t lane) const {
    const int64_t count = FULL ? W : std::min(W, columns - starts[v]);
    return P::Panel::from_words(image_words<P>(image + starts[v], at, s, lane, K, count));
  }
};

// NV vectors of outputs of each of MR channels. TAPS gives what lane l takes at step s:
// weight(channel, s, l), place(vector, s, l).
template <class P, int L, int MR, int NV, class TAPS>
struct Direct {
  const TAPS& taps;
  int64_t K;

  struct Vectors {
    f32x16 v[MR * NV];
  };

  template <int LANE>
  BIC_INLINE Vectors lane() const {
    using Panel = typename P::Panel;
    constexpr int64_t kStep = P::kBlock, kFirst = LANE * (kStep / W);
    Vectors sum;
#pragma GCC unroll 8
    for (int i = 0; i < MR * NV; i++) sum.v[i] = zero();
    const auto take = [&](int64_t s) __attribute__((always_inline)) {
      typename Panel::Vector x[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) x[v] = taps.place(v, s, LANE);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const auto w = taps.weight(m, s, LANE);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum.v[m * NV + v] = Panel::mac(sum.v[m * NV + v], w, x[v]);
      }
    };
    if constexpr (L < W) {
      if (kFirst < K) take(0);
    } else {
      for (int64_t s = 0; kFirst + s * kStep < K; s++) take(s);
    }
    return sum;
  }

  // Lanes LANE, LANE + STEP, LANE + 2 STEP, ... joined as in the tree.
  template <int LANE, int STEP, class F>
  static BIC_INLINE Vectors tree(const F& leaf) {
    if constexpr (STEP == W) {
      return leaf(std::integral_constant<int, LANE>{});
    } else {
      Vectors x = tree<LANE, 2 * STEP>(leaf);
      if constexpr (LANE + STEP < L) {
        const Vectors y = tree<LANE + STEP, 2 * STEP>(leaf);
#pragma GCC unroll 8
        for (int i = 0; i < MR * NV; i++) x.v[i] = x.v[i] + y.v[i];
      }
      return x;
    }
  }

  // All lanes at once, apart from the tree, which rounds in another mode.
  __attribute__((noinline)) void lanes_apart(Vectors* to) const {
    [&]<int... LANE>(std::integer_sequence<int, LANE...>) {
      ((to[LANE] = lane<LANE>()), ...);
    }(std::make_integer_sequence<int, L>());
  }

  // To tile[MR][NV][16].
  void run(float* tile) const {
    // Where the last term of a lane is 0 * 0, as lanes beyond L are: one +0 is added for all of them,
    // for a sum of zeros is -0 only if each of them is.
    const bool padded = lanes_of<P>((K - 1) % P::kBlock + 1) < W;
    Vectors sum;
    if constexpr (P::Panel::kFlush) {
      Vectors lanes[L];
      {
        FloatMode mode(true);
        lanes_apart(lanes);
      }
      sum = tree<0, 1>([&](auto i) __attribute__((always_inline)) { return lanes[i]; });
    } else {
      sum = tree<0, 1>([&](auto i) __attribute__((always_inline)) { return lane<i>(); });
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR * NV; i++)
      store_raw(tile + i * W, padded ? sum.v[i] + zero() : sum.v[i]);
  }
};

}  // namespace bic::simd

#endif
