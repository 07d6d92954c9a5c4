// The matrix products, in the order of kernels/matmul.
#include "../common/functions.h"
#include "../common/tensor.h"
#include "columns.h"
#include "panels.h"
#include "rows.h"

namespace bic::simd {
namespace {

// Below so many rows packing b would cost more than it saves; of b walked along N, below
// `kFewColumnRows` (both were measured).
constexpr int64_t kFewRows = 64;

// One product: a [M, K] with contiguous rows, or columns if there are `kFewRows` or more; b [K, N]
// walked along K (rows of its transpose) or N.
template <class P>
struct Product {
  using T = typename P::Element;
  const T *a, *b;
  int64_t M, N, K, lda, ldb;
  bool a_along_k, along_k;
  Output<T> out;

  void run() const {
    if (along_k && M < kFewRows) run_rows();
    else if (!along_k && M < kFewColumnRows) run_columns();
    else run_panels();
  }

 private:
  static constexpr int64_t kFewColumnRows = P::kBlock == 32 ? 8 : 24;

  void run_columns() const {
    constexpr int64_t kBlock = kColumnVectors * W;
    const Scratch<Word> packed(M * steps_of<P>(K) * W);
    pack_words<P>(a, lda, M, K, packed);
    parallel((N + kBlock - 1) / kBlock, kBlock * M * K / W, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * kBlock; n < std::min(N, end * kBlock); n += kBlock)
        by_columns<P>(packed, b, ldb, M, K, n, std::min(N, n + kBlock), out);
    });
  }
  void run_rows() const {
    constexpr int64_t kColumns = 24;  // a multiple of every tile's width
    parallel((N + kColumns - 1) / kColumns, kColumns * M * K / W, [&](int64_t begin, int64_t end) {
      by_rows<P>(a, lda, b, ldb, M, K, out, begin * kColumns, std::min(N, end * kColumns));
    });
  }

  void run_panels() const {
    const int64_t steps = steps_of<P>(K), block = panel_size(steps, kPanelM);
    const Scratch<Word> packed((M + W) / kPanelM * block);
    parallel((M + W - 1) / W, W * K, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * W; m < std::min(M, end * W); m += W)
        pack_rows(m, packed + m / kPanelM * block);
    });
    const int64_t vectors = (N + W - 1) / W, threes = whole_panels(vectors);
    const int64_t panels = threes + (vectors - threes * kPanelN + 1) / 2;
    const int64_t chunk = chunk_rows(panels), chunks = (M + chunk - 1) / chunk;
    parallel(panels * chunks, kPanelN * std::min(M, chunk) * K, [&](int64_t begin, int64_t end) {
      const Scratch<Word> panel(panel_size(steps, kPanelN * W));
      int64_t ready = -1;
      for (int64_t i = begin; i < end; i++) {
        const int64_t p = i / chunks, m = i % chunks * chunk;
        const int64_t v = p < threes ? p * kPanelN : threes * kPanelN + 2 * (p - threes);
        const int64_t nv = panel_vectors(v, vectors);
        if (ready != p) pack_panel(v, nv, panel);
        ready = p;
        const Word* rows = packed + m / kPanelM * block;
        panel_rows(rows, panel, m, std::min(M, m + chunk), v * W, nv);
      }
    });
  }

  static int64_t whole_panels(int64_t vectors) {
    const int64_t whole = vectors / kPanelN;
    return kPanelN == 3 && vectors % 3 == 1 && whole ? whole - 1 : whole;
  }
  // Rows of one task: all, unless there are too few panels for the threads.
  int64_t chunk_rows(int64_t panels) const {
    const int64_t wanted = (2 * torch::stable::get_num_threads() + panels - 1) / panels;
    const int64_t rows = std::max<int64_t>(64, (M + wanted - 1) / wanted);
    return (rows + W - 1) / W * W;
  }

  void pack_rows(int64_t m, Word* to) const {
    const int64_t rows = std::min(W, M - m);
    if (a_along_k) pack_a<P>(a + m * lda, lda, rows, K, to);
    else pack_a_columns<P>(a + m, lda, rows, K, to);
  }
  void pack_panel(int64_t v, int64_t nv, Word* to) const {
    const int64_t n = v * W, width = nv * W;
    if (!along_k) return pack_b_columns<P>(b + n, ldb, std::min(width, N - n), K, width, to);
    for (int64_t i = 0; i < nv; i++) {
      const int64_t row = n + i * W;
      pack_b_rows<P>(b + row * ldb, ldb, std::min(W, N - row), K, width, to + i * W);
    }
  }
  void panel_rows(const Word* rows, const Word* panel, int64_t m, int64_t m1, int64_t n,
                  int64_t nv) const {
    if (nv == 1) panel_blocks<typename P::Panel, T, 1>(rows, panel, m, m1, K, n, N, out);
    if constexpr (kPanelN == 3) {
      if (nv == 2) panel_blocks<typename P::Panel, T, 2>(rows, panel, m, m1, K, n, N, out);
      if (nv == 3) panel_blocks<typename P::Panel, T, 3>(rows, panel, m, m1, K, n, N, out);
    }
  }
};

// ---- operands

struct Operand {
  Tensor t;
  int64_t batch_stride, ld;
  bool along_k;
};

int64_t stride(const Tensor& t, int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; }

Operand rows_of(const Tensor& t) {
  const int64_t d = t.dim() - 2;
  if (t.size(d + 1) > 1 && t.stride(d + 1) != 1) return rows_of(torch::stable::contiguous(t));
  return {t, d ? stride(t, 0) : 0, stride(t, d), true};
}
Operand left(const Tensor& t) {
  const int64_t d = t.dim() - 2;
  const bool columns = t.size(d + 1) > 1 && t.stride(d + 1) != 1 && t.stride(d) == 1;
  if (!columns || t.size(d) < kFewRows) return rows_of(t);
  return {t, d ? stride(t, 0) : 0, stride(t, d + 1), false};
}
Operand right(const Tensor& t) {
  const int64_t d = t.dim() - 2, batch = d ? stride(t, 0) : 0;
  if (t.size(d) <= 1 || t.stride(d) == 1) return {t, batch, stride(t, d + 1), true};
  if (t.size(d + 1) <= 1 || t.stride(d + 1) == 1) return {t, batch, stride(t, d), false};
  return right(torch::stable::contiguous(t));
}

struct Bias {
  const Tensor* self = nullptr;
  float beta = 0.f, alpha = 1.f;
  bool round_first = false;
};

template <class P>
void run(const Operand& a, const Operand& b, const Bias& bias, const Tensor& c) {
  using T = typename P::Element;
  const int64_t d = c.dim() - 2, M = c.size(d), N = c.size(d + 1), K = a.t.size(d + 1);
  Product<P> one{data<T>(a.t), data<T>(b.t), M, N, K, a.ld, b.ld, a.along_k, b.along_k, {}};
  one.out = {mutable_data<T>(c), N};
  one.out.alpha = bias.alpha;
  one.out.round_first = bias.round_first;
  int64_t batch_stride = 0;
  if (bias.self && bias.beta != 0.f) {
    const Tensor& s = *bias.self;
    STD_TORCH_CHECK(s.scalar_type() == dtype_of<T>, "addmm: self has another dtype");
    one.out.self = data<T>(s);
    one.out.beta = bias.beta;
    if (s.dim() >= 1) one.out.stride_n = stride(s, s.dim() - 1);
    if (s.dim() >= 2) one.out.stride_m = stride(s, s.dim() - 2);
    if (s.dim() >= 3) batch_stride = stride(s, 0);
  }
  if (d == 0) return one.run();
  const auto batch = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      Product<P> p = one;
      p.a += i * a.batch_stride;
      p.b += i * b.batch_stride;
      p.out.c += i * M * N;
      if (p.out.self) p.out.self += i * batch_stride;
      p.run();
    }
  };
  parallel(c.size(0), M * N * K / W, batch);
}

Tensor product(const Tensor& left_, const Tensor& right_, const Bias& bias) {
  const int64_t d = left_.dim() - 2;
  STD_TORCH_CHECK(right_.dim() == d + 2 && left_.size(d + 1) == right_.size(d),
                  "matmul: sizes do not fit");
  STD_TORCH_CHECK(left_.scalar_type() == right_.scalar_type(), "matmul: dtypes differ");
  Sizes shape = sizes(left_);
  shape[d + 1] = right_.size(d + 1);
  Tensor c = empty(left_, shape);
  if (c.numel() == 0) return c;
  const Operand a = left(left_), b = right(right_);
  dispatch(left_.scalar_type(), [&](auto t) {
    using T = decltype(t);
    if constexpr (std::is_same_v<T, bf16>) run<Pair>(a, b, bias, c);
    else run<Single<T>>(a, b, bias, c);
  });
  return c;
}

// Rows [ends[g - 1], ends[g]) of a times b[g]; rows behind the last end are 0.
template <class P, class I>
void run_groups(const Operand& a, const Operand& b, const I* ends, int64_t groups,
                const Tensor& c) {
  using T = typename P::Element;
  const int64_t M = c.size(0), N = c.size(1), K = a.t.size(1);
  int64_t begin = 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t end = std::clamp((int64_t)ends[g], begin, M);
    Product<P> one{data<T>(a.t) + begin * a.ld, data<T>(b.t) + g * b.batch_stride, end - begin,
                   N, K, a.ld, b.ld, true, b.along_k, {}};
    one.out = {mutable_data<T>(c) + begin * N, N};
    if (begin < end) one.run();
    begin = end;
  }
  std::memset(mutable_data<T>(c) + begin * N, 0, (M - begin) * N * sizeof(T));
}

// ---- the ops; tf32 concerns GPUs only

Tensor mm(const Tensor& self, const Tensor& mat2, bool) { return product(self, mat2, {}); }
Tensor bmm(const Tensor& self, const Tensor& mat2, bool) { return product(self, mat2, {}); }
Tensor addmm(const Tensor& self, const Tensor& mat1, const Tensor& mat2, double beta, double alpha,
             bool) {
  return product(mat1, mat2, {&self, (float)beta, (float)alpha});
}
Tensor baddbmm(const Tensor& self, const Tensor& batch1, const Tensor& batch2, double beta,
               double alpha, bool) {
  return product(batch1, batch2, {&self, (float)beta, (float)alpha});
}

Tensor grouped_mm(const Tensor& self, const Tensor& mat2, const Tensor& offs, bool) {
  STD_TORCH_CHECK(self.dim() == 2 && mat2.dim() == 3 && self.size(1) == mat2.size(1),
                  "grouped_mm: sizes do not fit");
  STD_TORCH_CHECK(self.scalar_type() == mat2.scalar_type(), "grouped_mm: dtypes differ");
  const Tensor c = empty(self, {self.size(0), mat2.size(2)});
  if (c.numel() == 0) return c;
  const Operand a = rows_of(self), b = right(mat2);
  const Tensor ends = torch::stable::contiguous(offs);
  dispatch(self.scalar_type(), [&](auto t) {
    using T = decltype(t);
    using P = std::conditional_t<std::is_same_v<T, bf16>, Pair, Single<T>>;
    if (ends.scalar_type() == ScalarType::Long)
      run_groups<P>(a, b, data<int64_t>(ends), mat2.size(0), c);
    else
      run_groups<P>(a, b, data<int32_t>(ends), mat2.size(0), c);
  });
  return c;
}

Tensor mm_add(const Tensor& self, const Tensor& mat2, const Tensor& other, bool) {
  return product(self, mat2, {&other, 1.f, 1.f, true});
}

Tensor swiglu(const Tensor& self, const Tensor& gate, const Tensor& up, bool) {
  const Tensor x = product(self, gate, {}), y = product(self, up, {});
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* gates = mutable_data<T>(x);
    const T* ups = data<T>(y);
    const int64_t blocks = (x.numel() + W - 1) / W;
    parallel(blocks, W, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * W; i < std::min(x.numel(), end * W); i += W) {
        const int64_t n = std::min(W, x.numel() - i);
        const f32x16 v = load(gates + i, n);
        const f32x16 silu = rounded(v / (splat(1.f) + bic::exp(zero() - v)), T{});
        store(gates + i, silu * load(ups + i, n), n);
      }
    });
  });
  return x;
}

std::tuple<Tensor, Tensor, Tensor> qkv_proj(
    const Tensor& self, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& q_bias, const std::optional<Tensor>& k_bias,
    const std::optional<Tensor>& v_bias, bool) {
  const auto one = [&](const Tensor& weight, const std::optional<Tensor>& bias) {
    return product(self, weight, bias ? Bias{&*bias, 1.f} : Bias{});
  };
  return {one(q, q_bias), one(k, k_bias), one(v, v_bias)};
}

}  // namespace

// Whether this build has the right bits on this machine; if not it registers nothing.
extern "C" __attribute__((visibility("default"))) int bicompile_matmul_is_exact() {
  return pair_is_exact();
}

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  if (!pair_is_exact()) return;
  m.impl("mm", TORCH_BOX(&mm));
  m.impl("addmm", TORCH_BOX(&addmm));
  m.impl("bmm", TORCH_BOX(&bmm));
  m.impl("baddbmm", TORCH_BOX(&baddbmm));
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("mm_add", TORCH_BOX(&mm_add));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("qkv_proj", TORCH_BOX(&qkv_proj));
}

}  // namespace bic::simd
