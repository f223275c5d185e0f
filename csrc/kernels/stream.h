// Few rows times bf16 and int8 weights: each weight is widened in registers on its way from memory.
//
// Up to 8 rows the bytes bind. 16 int8 weights cost two operations and an FMA a row: at 1 row 1.5 cycles for
// 16 bytes, 30 GB/s at 2.8 GHz, above what one core reads; 32 bf16 weights cost two operations and two FMAs,
// 90 GB/s. Widening into L1 first, as more rows do it, took 10 and 6 GB/s: 4 bytes of stores for each weight.
#pragma once

#include "kernels/tile.h"

namespace prunekern {

// Input I of four, of one vector of a panel, c channels from its first; bf16: pairs of inputs lie side by
// side.
template <class V>
struct Bf16Weights {
  using T = std::uint16_t;
  template <int I>
  static typename V::F get(const T* panel, int c) {
    const T* pairs = panel + I / 2 * 4 * V::kWidth + 2 * c;
    return I % 2 == 0 ? V::load_even(pairs) : V::load_odd(pairs);
  }
};

// int8: fours of them.
template <class V>
struct Int8Weights {
  using T = std::int8_t;
  template <int I>
  static typename V::F get(const T* panel, int c) {
    return V::template load_one_of_four<I>(panel + 4 * c);
  }
};

// acc [R, width] = a [R, k] times one panel. Weights are drawn into L2 from `ahead` bytes on, or, of one row,
// into L1.
template <class V, int R, class Weights>
void stream(const StreamArgs& args) {
  using F = typename V::F;
  using T = typename Weights::T;
  constexpr int kVector = V::kWidth, kLineBytes = 64, kChains = chains(2 * R);
  constexpr int kFour = 4 * 2 * kVector;  // values of four steps
  constexpr int kLines = (kFour * static_cast<int>(sizeof(T)) + kLineBytes - 1) / kLineBytes;
  const std::int64_t stride = args.a_stride;
  const float* a = args.a;
  const T* panel = static_cast<const T*>(args.panel);

  F acc[kChains][R][2];
#pragma GCC unroll 4
  for (int s = 0; s < kChains; ++s)
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) acc[s][r][c] = V::set(0.0f);

  auto step = [&](int k, int c, F weights) __attribute__((always_inline)) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
      acc[k % kChains][r][c] = V::madd(V::set(a[r * stride + k]), weights, acc[k % kChains][r][c]);
  };

  std::int64_t k = args.k;
  for (; k >= 4; k -= 4) {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
      const char* line = reinterpret_cast<const char*>(panel) + args.ahead + i * kLineBytes;
      if (R == 1 && args.into_l1)
        __builtin_prefetch(line, 0, 0);
      else
        __builtin_prefetch(line, 0, 2);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      step(0, c, Weights::template get<0>(panel, c * kVector));
      step(1, c, Weights::template get<1>(panel, c * kVector));
      step(2, c, Weights::template get<2>(panel, c * kVector));
      step(3, c, Weights::template get<3>(panel, c * kVector));
    }
    a += 4;
    panel += kFour;
  }
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    if (k > 0) step(0, c, Weights::template get<0>(panel, c * kVector));
    if (k > 1) step(1, c, Weights::template get<1>(panel, c * kVector));
    if (k > 2) step(2, c, Weights::template get<2>(panel, c * kVector));
  }

#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      F sum = acc[0][r][c];
#pragma GCC unroll 4
      for (int s = 1; s < kChains; ++s) sum = V::add(sum, acc[s][r][c]);
      V::store(args.acc + (2 * r + c) * kVector, sum);
    }
}

}  // namespace prunekern
