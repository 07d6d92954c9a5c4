// Elementary float functions with one algorithm for every width.
//
// Each function is a template over V = float or a GNU vector of 8 or 16 floats, written with + - * /,
// fma, integer operations and selects alone. All of these round as IEEE 754 says, so a lane's bits
// depend on that lane's input only: scalar, AVX2, AVX-512 and plain builds agree, and a vector body,
// its tail and a scalar loop are the same function.
//
// Compile with -ffp-contract=off and without -ffast-math. Included after Inductor's cpp_prefix.h the
// header also serves at::vec::Vectorized<float> and VectorizedN<float, N>.
//
// Largest errors over every 37th of all floats, in units in the last place:
//   exp 0.99  expm1 1.36  tanh 1.23  log 0.81  log1p 0.88  erf 0.99  sin 0.77  cos 0.77
#ifndef BICOMPILE_FUNCTIONS_H
#define BICOMPILE_FUNCTIONS_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a call: all is inlined
#endif

#define BIC_INLINE __attribute__((always_inline)) inline

namespace bic {

// ---- Lanes -------------------------------------------------------------------------------------

template <int N>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * N)));
  typedef int32_t Int __attribute__((vector_size(4 * N)));
};
template <>
struct Lanes<1> {
  typedef float Float;
  typedef int32_t Int;
};
template <class V>
inline constexpr int lanes = sizeof(V) / sizeof(float);
template <class V>
using IntOf = typename Lanes<lanes<V>>::Int;

// The widest vector that the machine computes at once; wider ones are done in halves.
#if defined(__AVX512F__)
inline constexpr int native_lanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
inline constexpr int native_lanes = 8;
#else
inline constexpr int native_lanes = 1;
#endif

template <class T, class U>
BIC_INLINE T bit_cast(U from) {
  static_assert(sizeof(T) == sizeof(U), "bit_cast keeps the size");
  T to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

template <class V>
BIC_INLINE V splat(float x) {
  if constexpr (lanes<V> == 1) return x;
  else return x - V{};  // x - 0 is x, also for x = -0
}
template <class V>
BIC_INLINE IntOf<V> splat_int(int32_t x) {
  if constexpr (lanes<V> == 1) return x;
  else return x + IntOf<V>{};
}

template <class M, class T>
BIC_INLINE T select(M mask, T yes, T no) {
  return mask ? yes : no;
}

BIC_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class V>
BIC_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (lanes<V> == 16) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__AVX2__) && defined(__FMA__)
  if constexpr (lanes<V> == 8) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  V r;
  for (int i = 0; i < lanes<V>; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}

namespace detail {

// True if a lane is not <= limit (NaN counts).
template <class V>
BIC_INLINE bool any_beyond(V x, float limit) {
#if defined(__AVX512F__)
  if constexpr (lanes<V> == 16)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_NLE_UQ) != 0;
#endif
#if defined(__AVX2__)
  if constexpr (lanes<V> == 8)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_NLE_UQ)) != 0;
#endif
  if constexpr (lanes<V> == 1) return !(x <= limit);
  else return true;
}

template <class V>
BIC_INLINE V absolute(V x) {
  return bit_cast<V>(bit_cast<IntOf<V>>(x) & splat_int<V>(0x7fffffff));
}

template <class V>
BIC_INLINE V with_sign_of(V magnitude, V sign) {  // magnitude >= 0 or NaN
  return bit_cast<V>((bit_cast<IntOf<V>>(magnitude) & splat_int<V>(0x7fffffff)) |
                     (bit_cast<IntOf<V>>(sign) & splat_int<V>(INT32_MIN)));
}

template <class V>
BIC_INLINE V at_most(V x, float high) {  // NaN stays
  return select(x > splat<V>(high), splat<V>(high), x);
}
template <class V>
BIC_INLINE V at_least(V x, float low) {  // NaN stays
  return select(x < splat<V>(low), splat<V>(low), x);
}

template <class V>
BIC_INLINE V power_of_two(IntOf<V> n) {  // n in [-126, 127]
  return bit_cast<V>((n + splat_int<V>(127)) << 23);
}

// Rounds |x| < 2^22 to the nearest integer, returned as an integer too.
template <class V>
BIC_INLINE IntOf<V> round_to_int(V& x) {
  V shifted = x + splat<V>(0x1.8p23f);
  x = shifted - splat<V>(0x1.8p23f);
  return bit_cast<IntOf<V>>(shifted) - splat_int<V>(0x4b400000);
}

template <class V>
BIC_INLINE V horner(V, float c) {
  return splat<V>(c);
}
template <class V, class... Rest>
BIC_INLINE V horner(V x, float c, Rest... higher) {  // c + x * (higher ...)
  return fma(horner(x, higher...), x, splat<V>(c));
}

// ---- Exponentials ------------------------------------------------------------------------------

// x = n ln 2 + r with |r| <= ln 2 / 2; returns exp(r) - 1.
template <class V>
BIC_INLINE V exp_reduced(V x, IntOf<V>& n) {
  V k = x * splat<V>(0x1.715476p+0f);
  n = round_to_int(k);
  V r = fma(k, splat<V>(-0x1.62e4p-1f), x);
  r = fma(k, splat<V>(-0x1.7f7d1cp-20f), r);
  V q = horner(r, 0.5f, 0x1.555554p-3f, 0x1.5554bp-5f, 0x1.11118ap-7f, 0x1.6d723ep-10f,
               0x1.a032bep-13f);
  return fma(q * r, r, r);
}

template <class V>
BIC_INLINE V exp(V x) {
  IntOf<V> n;
  V p = exp_reduced(at_least(at_most(x, 90.f), -105.f), n);
  // 2^n in two factors: no early overflow, and a denormal result rounds once.
  IntOf<V> half = n >> 1;
  return ((p + splat<V>(1.f)) * power_of_two<V>(half)) * power_of_two<V>(n - half);
}

template <class V>
BIC_INLINE V expm1(V x) {
  IntOf<V> n;
  V p = exp_reduced(at_least(at_most(x, 89.f), -30.f), n);
  // 2^n p + (2^n - 1), halved on the way because n can be 128. From 2^24 on, 2^n - 1 would round.
  V s = power_of_two<V>(n - splat_int<V>(1)), half = splat<V>(-0.5f);
  auto large = s > splat<V>(0x1p23f);
  V r = fma(s, p, select(large, half, s + half)) + select(large, s, splat<V>(0.f));
  return select(absolute(x) < splat<V>(0x1p-26f), x, r + r);
}

template <class V>
BIC_INLINE V tanh(V x) {
  V a = absolute(x), square = x * x;
  V q = horner(square, -0x1.55553ep-2f, 0x1.1109bep-3f, -0x1.b89abap-5f, 0x1.54c3c2p-6f,
               -0x1.828776p-8f);
  V small = fma(q * square, x, x);
  // 1 - 2 / (exp(2|x|) + 1); beyond 10 the result is 1.
  IntOf<V> n;
  V p = exp_reduced(at_most(a + a, 20.f), n), s = power_of_two<V>(n), one = splat<V>(1.f);
  V large = one - splat<V>(2.f) / fma(s, p, s + one);
  return with_sign_of(select(a < splat<V>(0.6f), small, large), x);
}

template <class V>
BIC_INLINE V sigmoid(V x) {
  return splat<V>(1.f) / (splat<V>(1.f) + detail::exp(-x));
}

// ---- Logarithms --------------------------------------------------------------------------------

// y = 2^e m with m in [sqrt(1/2), sqrt(2)); y positive and normal.
template <class V>
BIC_INLINE V split_exponent(V y, IntOf<V>& e) {
  IntOf<V> bits = bit_cast<IntOf<V>>(y);
  e = (bits - splat_int<V>(0x3f3504f3)) >> 23;
  return bit_cast<V>(bits - (e << 23));
}

template <class V>
BIC_INLINE V int_to_float(IntOf<V> n) {  // |n| < 2^22
  return bit_cast<V>(n + splat_int<V>(0x4b400000)) - splat<V>(0x1.8p23f);
}

// log(1 + f) + low + e ln 2, f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <class V>
BIC_INLINE V log_reduced(V f, V low, IntOf<V> e) {
  V k = int_to_float<V>(e), f2 = f * f;
  V p = horner(f, 0x1.555548p-2f, -0x1.00007p-2f, 0x1.99a542p-3f, -0x1.552f1p-3f, 0x1.2302f8p-3f,
               -0x1.0103b8p-3f, 0x1.f00536p-4f, -0x1.bf2954p-4f, 0x1.b4d2e4p-5f);
  V y = fma(f2 * f, p, fma(f2, splat<V>(-0.5f), low));
  y = fma(k, splat<V>(0x1.7f7d1cp-20f), y);
  return fma(k, splat<V>(0x1.62e4p-1f), f + y);
}

// The values of log at its ends: `at` is the distance from the pole, `r` the value inside.
template <class V>
BIC_INLINE V log_ends(V at, V r) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  V outside = select(at == splat<V>(0.f), splat<V>(-inf), splat<V>(NAN));
  r = select(at > splat<V>(0.f), r, outside);
  return select(at == splat<V>(inf), at, r);
}

template <class V>
BIC_INLINE V log(V x) {
  V y = select(x > splat<V>(0.f), x, splat<V>(1.f));
  auto denormal = y < splat<V>(0x1p-126f);
  IntOf<V> e;
  V m = split_exponent(select(denormal, y * splat<V>(0x1p23f), y), e);
  e = e - select(denormal, splat_int<V>(23), splat_int<V>(0));
  return log_ends(x, log_reduced(m - splat<V>(1.f), splat<V>(0.f), e));
}

template <class V>
BIC_INLINE V log1p(V x) {
  V one = splat<V>(1.f), y = select(x > -one, x, splat<V>(0.f)), u = one + y;
  IntOf<V> e;
  V m = split_exponent(u, e);
  // What u lost to rounding, brought to the scale of m (above 2^64 it no longer counts) and
  // multiplied by the slope 1 / m, of which 1 - f + f^2 is enough.
  V lost = select(y < one, y - (u - one), one - (u - y));
  IntOf<V> shift = select(e > splat_int<V>(64), splat_int<V>(64), e);
  V f = m - one, slope = horner(f, 1.f, -1.f, 1.f);
  V low = lost * power_of_two<V>(splat_int<V>(0) - shift) * slope;
  V r = log_ends(x + one, log_reduced(f, low, e));
  return select(absolute(x) < splat<V>(0x1p-25f), x, r);
}

// ---- Error function ----------------------------------------------------------------------------

template <class V>
BIC_INLINE V erf(V x) {
  V a = absolute(x), s = x * x;
  V small = fma(horner(s, 0x1.06eba8p-3f, -0x1.812740p-2f, 0x1.ce2d62p-4f, -0x1.b800d6p-6f,
                       0x1.5446f8p-8f, -0x1.a5eb36p-11f, 0x1.4ef9b8p-14f),
                x, x);
  // log erfc(t) = -t - t q(t); beyond 4 the result is 1.
  V t = at_most(a, 4.f);
  V q = horner(t, 0x1.077b2cp-3f, 0x1.453036p-1f, 0x1.b3445cp-4f, -0x1.85bb98p-6f, 0x1.defdb8p-9f,
               -0x1.558f6cp-12f, 0x1.82aca4p-17f);
  IntOf<V> n;
  V p = exp_reduced(fma(q, -t, -t), n);
  V tail = splat<V>(1.f) - (p + splat<V>(1.f)) * power_of_two<V>(n);
  return select(a <= splat<V>(0x1.dbp-1f), small, with_sign_of(tail, x));
}

// ---- Sine and cosine ---------------------------------------------------------------------------

// Up to this |x|, pi/2 in three parts is enough; a lane beyond it is redone by the C library.
inline constexpr float reduction_limit = 48039.f;

template <class V>
BIC_INLINE V sin_shifted(V x, int quadrants) {
  V k = x * splat<V>(0x1.45f306p-1f);
  IntOf<V> j = round_to_int(k) + splat_int<V>(quadrants);
  // x - k pi/2 = r + low: the two largest parts are added without error.
  V r0 = fma(k, splat<V>(-0x1.921fbp+0f), x);
  V part = k * splat<V>(-0x1.5110b4p-22f), r = r0 + part, taken = r - r0;
  V low = fma(k, splat<V>(-0x1.5110b4p-22f), -part) + ((r0 - (r - taken)) + (part - taken));
  low = fma(k, splat<V>(-0x1.846988p-48f), low);
  V s = r * r, half = splat<V>(-0.5f), one = splat<V>(1.f);
  V p = horner(s, -0x1.555556p-3f, 0x1.111174p-7f, -0x1.a05956p-13f, 0x1.7c2da2p-19f);
  V sine = fma(p, s * r, fma(s * low, half, low)) + r;
  sine = select(x == splat<V>(0.f), x, sine);  // keeps -0
  V c = horner(s, 0x1.55554ap-5f, -0x1.6c0c26p-10f, 0x1.99e714p-16f);
  V square = s * half, head = one + square;  // 1 - s/2, with what the sum lost in the next line
  V cosine = head + fma(c, s * s, ((one - head) + square) - r * low);
  V v = select((j & splat_int<V>(1)) != splat_int<V>(0), cosine, sine);
  return bit_cast<V>(bit_cast<IntOf<V>>(v) ^ ((j & splat_int<V>(2)) << 30));
}

template <class V, class Library>
__attribute__((noinline, cold)) void redo_beyond(const V* x, V* v, Library library) {
  float from[lanes<V>], to[lanes<V>];
  std::memcpy(from, x, sizeof(V));
  std::memcpy(to, v, sizeof(V));
  for (int i = 0; i < lanes<V>; i++)
    if (!(std::fabs(from[i]) <= reduction_limit)) to[i] = library(from[i]);
  std::memcpy(v, to, sizeof(V));
}

template <class V, class Library>
BIC_INLINE V sin_anywhere(V x, int quadrants, Library library) {
  V v = sin_shifted(x, quadrants);
  if (__builtin_expect(any_beyond(absolute(x), reduction_limit), 0)) {
    V from = x, to = v;  // copies, so that x and v stay in registers
    redo_beyond(&from, &to, library);
    v = to;
  }
  return v;
}

template <class V>
BIC_INLINE V sin(V x) {
  return sin_anywhere(x, 0, [](float one) { return std::sin(one); });
}
template <class V>
BIC_INLINE V cos(V x) {
  return sin_anywhere(x, 1, [](float one) { return std::cos(one); });
}

}  // namespace detail

// ---- The public functions ----------------------------------------------------------------------

#define BIC_FUNCTION(name)                            \
  template <class V>                                  \
  BIC_INLINE V name(V x) {                            \
    if constexpr (lanes<V> <= native_lanes) {         \
      return detail::name(x);                         \
    } else {                                          \
      typename Lanes<lanes<V> / 2>::Float half[2];    \
      std::memcpy(half, &x, sizeof(x));               \
      half[0] = bic::name(half[0]);                   \
      half[1] = bic::name(half[1]);                   \
      std::memcpy(&x, half, sizeof(x));               \
      return x;                                       \
    }                                                 \
  }
#define BIC_EACH_FUNCTION(apply) \
  apply(exp) apply(expm1) apply(tanh) apply(sigmoid) apply(log) apply(log1p) apply(erf) \
  apply(sin) apply(cos)
BIC_EACH_FUNCTION(BIC_FUNCTION)

BIC_INLINE double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Remainder with the sign of the divisor, as torch.remainder.
template <class T>
inline T remainder(T a, T b) {
  T r = std::fmod(a, b);
  return r != 0 && (b < 0) != (r < 0) ? r + b : r;
}

// ---- at::vec, inside Inductor's kernels ----------------------------------------------------------

#if defined(INDUCTOR_USE_VECTOR_TYPES)
#if INDUCTOR_USE_VECTOR_TYPES()
#define BIC_AT_VEC(name)                                                                   \
  BIC_INLINE at::vec::Vectorized<float> name(at::vec::Vectorized<float> x) {               \
    constexpr int n = at::vec::Vectorized<float>::size();                                  \
    return bit_cast<at::vec::Vectorized<float>>(                                           \
        bic::name(bit_cast<typename Lanes<n>::Float>(x)));                                 \
  }                                                                                        \
  template <int N>                                                                         \
  BIC_INLINE at::vec::VectorizedN<float, N> name(const at::vec::VectorizedN<float, N>& x) { \
    at::vec::VectorizedN<float, N> r;                                                      \
    for (int i = 0; i < N; i++) r[i] = bic::name(x[i]);                                    \
    return r;                                                                              \
  }
BIC_EACH_FUNCTION(BIC_AT_VEC)
#endif
#endif

}  // namespace bic
#endif  // BICOMPILE_FUNCTIONS_H
