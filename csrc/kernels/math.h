// exp and the activations, for any vector type. About 30 operations for 16 values of gelu.
//
// Vector min(a, b) and max(a, b) follow x86: b where either is NaN. Every clamp below puts x second for that
// reason, so NaN goes through.
#pragma once

#include "kernel.h"

namespace prunekern {

// exp(x + extra), |extra| small: relative error under 3e-7 down to the denormals, exp(-inf) = 0, exp(inf) =
// inf. `extra` carries the part of the argument that fp32 rounding of x lost.
template <class V>
inline typename V::F exp_sum(typename V::F x, typename V::F extra) {
  using F = typename V::F;
  x = V::max(V::set(-87.0f), V::min(V::set(89.0f), x));
  const F n = V::round(V::mul(x, V::set(1.44269504f)));
  F r = V::fma(n, V::set(-0.693359375f), x);  // Cephes' split of ln 2: the first product is exact
  r = V::fma(n, V::set(2.12194440e-4f), r);
  r = V::add(r, extra);
  F p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), r);
  return V::scale(V::add(p, V::set(1.0f)), n);
}

// x * Phi(x), without the cancellation of 1 + erf(x) on the left: with t = 1 / (1 + 0.3 |x|),
// erfc(|x| / sqrt 2) = exp(-x^2 / 2) P(t). P is a minimax fit of degree 8 to erfcx on [0, 14.6] (relative
// error 5.8e-8). The square is carried exactly, in two parts. Beyond 12.9 the tail (1.6e-37) is zero, for the
// same reason.
template <class V>
inline typename V::F gelu(typename V::F x) {
  using F = typename V::F;
  const F limit = V::set(12.9f), whole = V::abs(x);
  const F size = V::min(limit, whole);
  const F t = V::div(V::set(1.0f), V::fma(size, V::set(0.3f), V::set(1.0f)));
  F p = V::set(7.682352255e-2f);
  p = V::fma(p, t, V::set(-3.386573216e-1f));
  p = V::fma(p, t, V::set(4.579909644e-1f));
  p = V::fma(p, t, V::set(-1.537790394e-1f));
  p = V::fma(p, t, V::set(2.855992093e-1f));
  p = V::fma(p, t, V::set(1.891425924e-1f));
  p = V::fma(p, t, V::set(2.438979453e-1f));
  p = V::fma(p, t, V::set(2.389673803e-1f));
  p = V::fma(p, t, V::set(1.480503533e-5f));
  const F half = V::mul(V::set(-0.5f), size);
  const F square = V::mul(half, size);  // -x^2 / 2
  const F lost = V::fma(half, size, V::sub(V::set(0.0f), square));
  F tail = V::mul(V::mul(V::set(0.5f), x), V::mul(p, exp_sum<V>(square, lost)));
  tail = V::select_positive(V::sub(whole, limit), V::set(0.0f), tail);
  return V::select_positive(x, V::sub(x, tail), tail);
}

// x / (1 + exp(-z)): silu with z = x; the tanh form of gelu with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <class V>
inline typename V::F gate(typename V::F x, typename V::F z) {
  const typename V::F zero = V::set(0.0f);
  return V::div(x, V::add(V::set(1.0f), exp_sum<V>(V::sub(zero, z), zero)));
}

template <class V, Activation act>
inline typename V::F activate(typename V::F x) {
  if constexpr (act == Activation::relu) return V::max(V::set(0.0f), x);
  if constexpr (act == Activation::gelu) return gelu<V>(x);
  if constexpr (act == Activation::silu) return gate<V>(x, x);
  if constexpr (act == Activation::gelu_tanh) {
    const typename V::F cubic = V::fma(V::mul(V::mul(x, x), V::set(0.044715f)), x, x);
    return gate<V>(x, V::mul(cubic, V::set(1.59576912f)));
  }
  return x;
}

}  // namespace prunekern
