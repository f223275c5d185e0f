// exp and the activations, for any vector type. 36 operations for 16 values of gelu.
//
// Vector min(a, b) and max(a, b) follow x86: b where either is NaN. Every clamp below puts x second for that
// reason, so NaN goes through.
#pragma once

#ifdef __FAST_MATH__
#error \
    "prunekern must be compiled without -ffast-math: NaN and rounding by magic numbers need IEEE arithmetic"
#endif

#include "kernels/kernel.h"

namespace prunekern {

// exp(x + extra), |extra| small, x in [-87, 89]: relative error under 3e-7. `extra` carries the part of the
// argument that fp32 rounding of x lost.
template <class V>
inline typename V::F exp_near(typename V::F x, typename V::F extra) {
  using F = typename V::F;
  const F magic = V::set(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  const F n = V::sub(V::madd(x, V::set(1.44269504f), magic), magic);
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

// The same for any x: down to the denormals, exp(-inf) = 0, exp(inf) = inf.
template <class V>
inline typename V::F exp_sum(typename V::F x, typename V::F extra) {
  return exp_near<V>(V::max(V::set(-87.0f), V::min(V::set(89.0f), x)), extra);
}

// x * Phi(x), without the cancellation of 1 + erf(x) on the left: with s = |x| and t = 1 / (1 + 0.3 s),
// erfc(s / sqrt 2) = exp(-s^2 / 2) P(t), and gelu(x) = max(x, 0) - s / 2 erfc(s / sqrt 2). P is a minimax fit
// of degree 8 to erfcx on [0, 14.6] (relative error 5.8e-8). The square is carried exactly, in two parts.
// From 12.9 on the second term (1.6e-37) stays as it is.
template <class V>
inline typename V::F gelu(typename V::F x) {
  using F = typename V::F;
  const F size = V::min(V::set(12.9f), V::abs(x));
  const F t = V::div(V::set(1.0f), V::madd(size, V::set(0.3f), V::set(1.0f)));
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
  const F square = V::mul(half, size);  // -s^2 / 2
  const F lost = V::fma(half, size, V::negative(square));
  return V::madd(half, V::mul(p, exp_near<V>(square, lost)), V::max(V::set(0.0f), x));
}

// The same within 5.2e-5, in 13 operations: x (1/2 + t P(t^2)) with t = x clamped to [-4.5, 4.5], P a minimax
// fit for the error of the whole that gives 0 at -4.5. For values that are as coarse as sums of 8-bit
// products.
template <class V>
inline typename V::F coarse_gelu(typename V::F x) {
  using F = typename V::F;
  const F from = V::max(V::set(-4.5f), x), t = V::min(V::set(4.5f), from), s = V::mul(t, t);
  F p = V::set(3.000423868e-11f);
  p = V::fma(p, s, V::set(-3.284283734e-9f));
  p = V::fma(p, s, V::set(1.580393558e-7f));
  p = V::fma(p, s, V::set(-4.431950401e-6f));
  p = V::fma(p, s, V::set(8.121267456e-5f));
  p = V::fma(p, s, V::set(-1.036272151e-3f));
  p = V::fma(p, s, V::set(9.580717422e-3f));
  p = V::fma(p, s, V::set(-6.597737223e-2f));
  p = V::fma(p, s, V::set(3.987086117e-1f));
  return V::mul(from, V::fma(p, t, V::set(0.5f)));
}

// x / (1 + exp(-z)): silu with z = x; the tanh form of gelu with z = 2 sqrt(2 / pi) (x + 0.044715 x^3); quick
// gelu with z = 1.702 x.
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
  if constexpr (act == Activation::quick_gelu) return gate<V>(x, V::mul(x, V::set(1.702f)));
  if constexpr (act == Activation::gelu_tanh) {
    const typename V::F cubic = V::fma(V::mul(V::mul(x, x), V::set(0.044715f)), x, x);
    return gate<V>(x, V::mul(cubic, V::set(1.59576912f)));
  }
  return x;
}

}  // namespace prunekern
