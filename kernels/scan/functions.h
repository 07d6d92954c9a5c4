// exp and log in double with one algorithm for every width, as common/functions.h has them for float.
//
// V is double or a GNU vector of doubles. Errors are below 1e-15 times the result: a float made of
// it is rounded once. No call of the C library, whose bits follow its version.
#ifndef BICOMPILE_SCAN_FUNCTIONS_H
#define BICOMPILE_SCAN_FUNCTIONS_H

#include <type_traits>

#include "../common/wide.h"

namespace bic::simd {

typedef int64_t i64part __attribute__((vector_size(8 * kPart)));
template <class V>
using Integers = std::conditional_t<std::is_same_v<V, double>, int64_t, i64part>;

template <class V>
BIC_INLINE V every(double x) {
  return x - V{};  // x - 0 is x, also for x = -0
}

template <class V>
BIC_INLINE V polynomial(V, double c) {
  return every<V>(c);
}
template <class V, class... Rest>
BIC_INLINE V polynomial(V x, double c, Rest... higher) {  // c + x * (higher ...)
  return polynomial(x, higher...) * x + c;
}

// exp(x) for x <= 0: 2^n exp(r) with |r| <= ln 2 / 2; 0 below -700.
template <class V>
BIC_INLINE V exp_below_one(V x) {
  using I = Integers<V>;
  const V shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52, n = shifted - 0x1.8p52;
  const V r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const V p = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720,
                         1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800,
                         1.0 / 479001600);
  const I exponent = bit_cast<I>(shifted) - bit_cast<int64_t>(0x1.8p52) + 1023;
  return x < -700.0 ? V{} : p * bit_cast<V>(exponent << 52);  // NaN stays: p is NaN
}

// log(1 + x) for x >= 0: e ln 2 + log(m) with m in [sqrt(1/2), sqrt(2)), and what 1 + x lost.
template <class V>
BIC_INLINE V log_above_one(V x) {
  using I = Integers<V>;
  const V u = x + 1.0;
  const I e = (bit_cast<I>(u) - bit_cast<int64_t>(0x1.6a09e667f3bcdp-1)) >> 52;
  const V f = bit_cast<V>(bit_cast<I>(u) - (e << 52)) - 1.0, s = f / (f + 2.0), z = s * s;
  const V tail = z * polynomial(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13,
                                1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21);
  const V lost = (x - (u - 1.0)) / u;  // keeps NaN
  const V k = bit_cast<V>(e + bit_cast<int64_t>(0x1.8p52)) - 0x1.8p52;
  return k * 0x1.62e42feep-1 + (k * 0x1.a39ef35793c76p-33 + (s + s) * (tail + 1.0) + lost);
}

}  // namespace bic::simd

#endif
