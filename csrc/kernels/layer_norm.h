// Layer norm of rows, for any vector type V; the rules of tile.h hold here too.
#pragma once

#include "kernels/kernel.h"

namespace prunekern {

// The sum of fn over a row.
template <class V, class Fn>
__attribute__((always_inline)) inline float sum_of(const float* x, std::int64_t n, Fn fn) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kAtOnce = 4;  // each sum waits for the one before
  F sums[kAtOnce];
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) sums[i] = V::set(0.0f);
  std::int64_t at = 0;
  for (; at + kAtOnce * kVector <= n; at += kAtOnce * kVector)
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) sums[i] = V::add(sums[i], fn(V::load(x + at + i * kVector)));
  for (; at + kVector <= n; at += kVector) sums[0] = V::add(sums[0], fn(V::load(x + at)));
  float lanes[kVector];
  V::store(lanes, V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  float sum = 0.0f;
  for (int i = 0; i < kVector; ++i) sum += lanes[i];
  for (; at < n; ++at) {
    V::store(lanes, fn(V::set(x[at])));
    sum += lanes[0];
  }
  return sum;
}

// Three passes over a row, which is in L1 after the first.
template <class V>
void layer_norm(const LayerNormArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
  for (std::int64_t r = 0; r < args.rows; ++r) {
    const float* x = args.x + r * args.x_stride;
    float* y = args.y + r * args.n;
    const float count = static_cast<float>(args.n);
    const F mean = V::set(sum_of<V>(x, args.n, [](F v) { return v; }) / count);
    const float variance = sum_of<V>(x, args.n,
                                     [&](F v) {
                                       const F off = V::sub(v, mean);
                                       return V::mul(off, off);
                                     }) /
                           count;
    const F inverse = V::set(1.0f / __builtin_sqrtf(variance + args.eps));
    const auto normed = [&](F v, F weight, F bias) __attribute__((always_inline)) {
      return V::madd(V::mul(V::sub(v, mean), inverse), weight, bias);
    };
    const F none = V::set(0.0f);
    std::int64_t at = 0;
    for (; at + kVector <= args.n; at += kVector)
      V::store(y + at, normed(V::load(x + at), V::load(args.weight + at),
                              args.bias == nullptr ? none : V::load(args.bias + at)));
    if (const int left = static_cast<int>(args.n - at); left > 0)
      V::store_part(y + at,
                    normed(V::load_part(x + at, left), V::load_part(args.weight + at, left),
                           args.bias == nullptr ? none : V::load_part(args.bias + at, left)),
                    left);
  }
}

}  // namespace prunekern
