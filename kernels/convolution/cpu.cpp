// Convolutions in the order of kernels/convolution: the products of kernels/matmul, whose columns
// are outputs and are packed from the image where they lie.
#include "../common/functions.h"
#include "channels.h"
#include "depthwise.h"
#include "direct.h"
#include "slide.h"

namespace bic::simd {
namespace {

// One phase of a convolution: images [B, G, C, ...], weights [G, M, K], results [B, G, M, ...].
template <class P>
struct Convolution {
  using T = typename P::Element;
  const Windows& windows;
  const T *images, *weights, *bias;  // bias may be null
  T* results;
  int64_t B, G, M, C, image_size, result_size;
  std::vector<int64_t> at = {};  // of each term: its offset in the image

  void run() {
    const int64_t image = windows.in_place ? image_size : windows.channel;
    for (int64_t c = 0; c < C; c++)
      for (const int64_t tap : windows.taps) at.push_back(c * image + tap);
    if (M <= kFewRows || terms() <= W) run_direct();
    else run_panels();
  }

 private:
  static constexpr int64_t kFewRows = 8;  // up to these, packing costs more than it saves
  static constexpr int kRows = kPanelM, kTile = 2 * kPanelM;  // vectors of outputs at a time
  static constexpr int64_t kMost = 1 << 24;  // elements of images laid out at a time

  int64_t terms() const { return at.size(); }

  // The rows' results of some vectors, from tile[row][vector][16].
  void put(const float* tile, int64_t nv, int64_t v0, int64_t m, int64_t rows, T* to,
           const T* of_bias) const {
    for (int64_t i = 0; i < rows; i++) {
      const f32x16 added = splat(of_bias ? to_float(of_bias[m + i]) : 0.f);
      for (int64_t v = 0; v < nv; v++) {
        const float* from = tile + (i * nv + v) * W;
        f32x16 y = load(from);
        if (of_bias) y = y + added;
        put_runs(y, windows.runs[v0 + v], to + (m + i) * result_size);
      }
    }
  }
  void put_runs(f32x16 y, const std::vector<Run>& runs, T* to) const {
    const int64_t next = windows.axis[2].next;
    if (next == 1 && runs.size() == 1 && runs[0].count == W) return store(to + runs[0].to, y);
    if (next == 1) {
      for (const Run& run : runs) store_lanes(to + run.to, y, run.column, run.count);
      return;
    }
    float buffer[W];
    store_raw(buffer, y);
    for (const Run& run : runs)
      for (int64_t i = 0; i < run.count; i++)
        to[run.to + i * next] = from_float<T>(buffer[run.column + i]);
  }

  // ---- few rows or terms: tasks are (image and group, block of rows)

  void run_direct() {
    const int64_t K = terms(), size = windows.in_place ? 0 : C * windows.channel;
    const int64_t steps = steps_of<P>(K), vectors = windows.vectors.size();
    const int64_t most = lanes_of<P>(K) == W ? kRows : 1, blocks = (M + most - 1) / most;
    const Scratch<Word> packed(G * M * steps * W);
    for (int64_t m = 0; m < G * M; m++)
      for (int64_t s = 0; s < steps; s++) {
        const i32x16 v = words(weights + m * K, s * P::kBlock, K);
        store_words(packed + (m * steps + s) * W, v);
      }
    parallel(B * G * blocks, most * vectors * (K + W), [&](int64_t begin, int64_t end) {
      const Scratch<T> laid(size);
      int64_t ready = -1;
      for (int64_t task = begin; task < end; task++) {
        const int64_t i = task / blocks, first = i % G * M, m = task % blocks * most;
        const T* image = images + i * C * image_size;
        if (size && ready != i)
          for (int64_t c = 0; c < C; c++)
            windows.lay_out(image + c * image_size, laid + c * windows.channel);
        ready = i;
        const Rows rows = {packed + first * steps * W, size ? laid : image,
                           bias ? bias + first : nullptr, results + i * M * result_size};
        direct_rows(rows, m, std::min(M, m + most));
      }
    });
  }
  // Of an image and group.
  struct Rows {
    const Word* weights;
    const T *image, *bias;
    T* results;
  };
  void direct_rows(const Rows& of, int64_t m, int64_t end) const {
    static constexpr auto kWays = []<int... L>(std::integer_sequence<int, L...>) {
      return std::array{&Convolution::direct_vectors<L + 1, 1>...};
    }(std::make_integer_sequence<int, W>());
    const int lanes = lanes_of<P>(terms());
    if (lanes == W)
      for (; m + kRows <= end; m += kRows) direct_vectors<W, kRows>(of, m);
    for (; m < end; m++) (this->*kWays[lanes - 1])(of, m);
  }
  template <int L, int MR>
  void direct_vectors(const Rows& of, int64_t m) const {
    constexpr int kVectors = MR == 1 ? 4 : kTile / MR;
    const int64_t K = terms(), n = windows.vectors.size(), row = steps_of<P>(K) * W;
    alignas(64) float tile[MR * kVectors * W];
    const auto run = [&]<int NV, bool FULL>(int64_t v) {
      const Neighbours<P, FULL> taps = {of.weights + m * row, row, of.image, at.data(),
                                        &windows.vectors[v], K, windows.columns};
      Direct<P, L, MR, NV, Neighbours<P, FULL>>{taps, K}.run(tile);
      put(tile, NV, v, m, MR, of.results, of.bias);
    };
    int64_t v = 0;
    for (; v + kVectors < n; v += kVectors) run.template operator()<kVectors, true>(v);
    for (; v < n; v++) run.template operator()<1, false>(v);
  }

  // ---- many rows: weights and outputs packed as panels

  void run_panels() {
    const int64_t K = terms(), steps = steps_of<P>(K), block = panel_size(steps, kPanelM);
    const int64_t blocks = (M + W - 1) / W * (W / kPanelM) * block;  // of a group
    const Scratch<Word> packed(G * blocks);
    const int64_t sixteens = (M + W - 1) / W;
    parallel(G * sixteens, W * K, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t g = i / sixteens, m = i % sixteens * W;
        pack_a<P>(weights + (g * M + m) * K, K, std::min(W, M - m), K,
                  packed + g * blocks + m / kPanelM * block);
      }
    });
    if (windows.in_place) return run_images(0, B, images, packed, blocks);
    const int64_t size = G * C * windows.channel;
    const int64_t some = std::clamp<int64_t>(kMost / std::max<int64_t>(size, 1), 1, B);
    const Scratch<T> laid(some * size);
    for (int64_t b = 0; b < B; b += some) {
      const int64_t n = std::min(some, B - b);
      const T* first = images + b * G * C * image_size;
      parallel(n * G * C, windows.channel, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          windows.lay_out(first + i * image_size, laid + i * windows.channel);
      });
      run_images(b, n, laid, packed, blocks);
    }
  }
  // Images [b, b + n), the first of which lies at `laid`; tasks are (image, group, panel, rows).
  void run_images(int64_t b, int64_t n, const T* laid, const Word* packed, int64_t blocks) const {
    const int64_t K = terms(), steps = steps_of<P>(K);
    const int64_t size = C * (windows.in_place ? image_size : windows.channel);
    std::vector<int64_t> panels;
    const int64_t vectors = windows.vectors.size();
    for (int64_t v = 0; v < vectors; v += panel_vectors(v, vectors)) panels.push_back(v);
    const int64_t wanted = 2 * torch::stable::get_num_threads(), tasks = n * G * panels.size();
    const int64_t rows = std::max<int64_t>(64, M / std::max<int64_t>(1, wanted / tasks));
    const int64_t chunk = (rows + W - 1) / W * W, chunks = (M + chunk - 1) / chunk;
    parallel(tasks * chunks, kPanelN * std::min(M, chunk) * K, [&](int64_t begin, int64_t end) {
      const Scratch<Word> panel(panel_size(steps, kPanelN * W));
      int64_t ready = -1;
      for (int64_t i = begin; i < end; i++) {
        const int64_t task = i / chunks, m = i % chunks * chunk;
        const int64_t image = task / (int64_t)panels.size();  // and group
        const int64_t v = panels[task % panels.size()], nv = panel_vectors(v, vectors);
        if (ready != task) pack_panel(laid + image * size, v, nv, panel);
        ready = task;
        const int64_t g = image % G, first = (b * G + image) * M;
        const Word* from = packed + g * blocks + m / kPanelM * panel_size(steps, kPanelM);
        panel_rows(from, panel, m, std::min(M, m + chunk), v, nv, results + first * result_size,
                   bias ? bias + g * M : nullptr);
      }
    });
  }
  void pack_panel(const T* image, int64_t v, int64_t nv, Word* to) const {
    const int64_t K = terms(), steps = steps_of<P>(K), width = nv * W;
    const int64_t stride = pair_stride(steps, width);
    for (int64_t j = 0; j < nv; j++, to += W) {
      const int64_t n = windows.vectors[v + j], count = std::min(W, windows.columns - n);
      const auto pack = [&](int64_t columns) __attribute__((always_inline)) {
        for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) {
            const i32x16 x = image_words<P>(image + n, at.data(), s, kLaneOrder[i], K, columns);
            store_words(to + i / 2 * stride + (2 * s + i % 2) * width, x);
          }
      };
      count == W ? pack(W) : pack(count);
    }
  }
  void panel_rows(const Word* a, const Word* panel, int64_t m, int64_t m1, int64_t v, int64_t nv,
                  T* to, const T* of_bias) const {
    if (nv == 1) blocks_of<1>(a, panel, m, m1, v, to, of_bias);
    if constexpr (kPanelN == 3) {
      if (nv == 2) blocks_of<2>(a, panel, m, m1, v, to, of_bias);
      if (nv == 3) blocks_of<3>(a, panel, m, m1, v, to, of_bias);
    }
  }
  template <int NV>
  void blocks_of(const Word* a, const Word* panel, int64_t m, int64_t m1, int64_t v, T* to,
                 const T* of_bias) const {
    const int64_t steps = steps_of<P>(terms());
    alignas(64) float tile[kPanelM * NV * W];
    for (int64_t rows; m < m1; m += rows, a += panel_size(steps, rows)) {
      rows = panel_block<typename P::Panel, NV>(a, panel, m, m1, steps, tile);
      put(tile, NV, v, m, rows, to, of_bias);
    }
  }
};

// ---- operands

// Weights of a phase as [G, M, K]: in place, or the taps that its outputs meet.
template <class T>
const T* weight_rows(const T* weight, const Windows& windows, int64_t all_taps, int64_t G,
                     int64_t M, int64_t C, bool transposed, const Scratch<T>& scratch) {
  const int64_t taps = windows.taps.size();
  if (!transposed) return weight;
  T* to = scratch;
  for (int64_t g = 0; g < G; g++)
    for (int64_t m = 0; m < M; m++)
      for (int64_t c = 0; c < C; c++)
        for (const int64_t number : windows.numbers)
          *to++ = weight[((g * C + c) * M + m) * all_taps + number];
  return scratch;
}

std::array<int64_t, 3> spatial(const Tensor& t) {
  std::array<int64_t, 3> found = {1, 1, 1};
  for (int64_t d = 2; d < t.dim(); d++) found[3 - t.dim() + d] = t.size(d);
  return found;
}
std::array<int64_t, 3> on_axes(const Sizes& given, int64_t otherwise) {
  std::array<int64_t, 3> found = {otherwise, otherwise, otherwise};
  std::copy(given.begin(), given.end(), found.end() - given.size());
  return found;
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   Sizes stride, Sizes padding, Sizes dilation, bool transposed,
                   Sizes output_padding, int64_t groups, bool) {
  STD_TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5 && weight.dim() == input.dim(),
                  "convolution: sizes do not fit");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type() &&
                      (!bias || bias->scalar_type() == input.scalar_type()),
                  "convolution: dtypes differ");
  const int64_t channels = transposed ? weight.size(0) : weight.size(1) * groups;
  STD_TORCH_CHECK(input.size(1) == channels && channels % groups == 0,
                  "convolution: channels do not fit");
  const auto s = on_axes(stride, 1), p = on_axes(padding, 0), d = on_axes(dilation, 1),
             extra = on_axes(output_padding, 0);
  const auto image = spatial(input), kernel = spatial(weight);
  std::array<int64_t, 3> total;
  for (int i = 0; i < 3; i++)
    total[i] = transposed
                   ? (image[i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + extra[i] + 1
                   : (image[i] + 2 * p[i] - d[i] * (kernel[i] - 1) - 1) / s[i] + 1;
  Sizes shape = {input.size(0), transposed ? weight.size(1) * groups : weight.size(0)};
  shape.insert(shape.end(), total.end() - (input.dim() - 2), total.end());
  const Tensor out = empty(input, shape);
  if (out.numel() == 0) return out;
  const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : bias;
  const int64_t M = shape[1] / groups, C = input.size(1) / groups;
  dispatch(input.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using P = std::conditional_t<std::is_same_v<T, bf16>, Pair, Single<T>>;
    const Tensor w = contiguous<T>(weight);
    const T* added = b ? data<T>(*b) : nullptr;
    const auto forward = [&](int a) {
      return forward_slide(image[a], kernel[a], total[a], s[a], p[a], d[a]);
    };
    if (C == 1 && M == 1 && groups >= kFewChannels && !transposed) {
      const bool last = channels_last(input);
      const Tensor x = last ? input : torch::stable::contiguous(input);
      const Depthwise<P> depthwise({forward(0), forward(1), forward(2)}, shape[0], groups, last);
      return depthwise.run(data<T>(x), data<T>(w), added, mutable_data<T>(out));
    }
    const Tensor x = contiguous<T>(input);
    const int64_t all_taps = kernel[0] * kernel[1] * kernel[2];
    const Scratch<T> scratch(transposed ? w.numel() : 0);
    const auto phases = transposed ? s : std::array<int64_t, 3>{1, 1, 1};
    for (int64_t i = 0; i < phases[0] * phases[1] * phases[2]; i++) {
      const int64_t r[3] = {i / (phases[1] * phases[2]), i / phases[2] % phases[1], i % phases[2]};
      if (r[0] >= total[0] || r[1] >= total[1] || r[2] >= total[2]) continue;
      std::array<Slide, 3> slides;
      for (int a = 0; a < 3; a++)
        slides[a] = transposed ? transposed_slide(image[a], kernel[a], total[a], s[a], p[a], d[a], r[a])
                               : forward(a);
      const Windows windows(slides, kernel, total);
      const T* rows = weight_rows(data<T>(w), windows, all_taps, groups, M, C, transposed, scratch);
      Convolution<P>{windows, data<T>(x), rows, added, mutable_data<T>(out),
                     shape[0], groups, M, C, image[0] * image[1] * image[2],
                     total[0] * total[1] * total[2]}.run();
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  if (!pair_is_exact()) return;
  m.impl("convolution", TORCH_BOX(&convolution));
}

}  // namespace bic::simd
