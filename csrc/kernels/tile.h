// The microkernel, written once for any vector type V and instantiated by generic.cpp, avx2.cpp, avx512.cpp.
//
// Those files are compiled for more than the baseline, and the linker keeps one copy of every inline
// function: nothing here may use an inline function of the standard library or one that is not a template
// over V, or an AVX-512 copy of it could end up in the path of a CPU without AVX-512.
#pragma once

#include "kernels/kernel.h"

namespace prunekern {

// An FMA takes 4 cycles and two start in each: under 8 accumulators they wait for one another. Few rows
// therefore split k over several sets of accumulators.
constexpr int chains(int accumulators) { return accumulators >= 8 ? 1 : accumulators >= 4 ? 2 : 4; }

// One tile: R rows of a times one panel of two vectors, held in 2 R registers over the whole of k. With C = 1
// only the first vector of the panel is read: the last panel of a weight often holds no more than that.
//
// AVX-512, R = 14: 28 accumulators, 2 vectors of weights, 1 broadcast = 31 of 32 registers; 28 FMAs (14
// cycles) need 16 loads (8 cycles), so FMAs bind. Weights come from L2 at 128 bytes per 14 cycles (of about
// 48 a cycle).
template <class V, int R, int C>
void tile(const TileArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kUnroll = 4, kLineBytes = 64, kChains = chains(R * C);
  // Three rows to a pointer: base, base + 4 stride, base + 8 stride are all x86 addressing modes, and five
  // pointers fit the integer registers where fourteen do not.
  constexpr int kGroups = (R + 2) / 3;
  const std::int64_t stride = args.a_stride;
  const float* a[kGroups];
  for (int g = 0; g < kGroups; ++g) a[g] = args.a + 3 * g * stride;
  const float* panel = args.panel;
  const char* next = args.next_weights;
  const char* y = args.y;
  const char* residual = args.residual;
  int rows_left = y != nullptr ? R : 0;

  F acc[kChains][R][C];
#pragma GCC unroll 4
  for (int s = 0; s < kChains; ++s)
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[s][r][c] = V::set(0.0f);
  if (args.accumulate) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[0][r][c] = V::load(args.acc + (2 * r + c) * kVector);
  }

  auto step = [&](int k) __attribute__((always_inline)) {
    F weights[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) weights[c] = V::load(panel + (2 * k + c) * kVector);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const F x = V::set(a[r / 3][r % 3 * stride + k]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[k % kChains][r][c] = V::madd(x, weights[c], acc[k % kChains][r][c]);
    }
  };

  std::int64_t k = args.k;
  for (; k >= kUnroll; k -= kUnroll) {
    for (std::int64_t i = 0; i < args.next_lines; ++i, next += kLineBytes) __builtin_prefetch(next, 0, 2);
    // One row at a time: all rows at once fill the line buffers, and the loads of this loop wait behind them.
    if (rows_left-- > 0) {
      for (std::int64_t i = 0; i < args.row_lines; ++i) __builtin_prefetch(y + i * kLineBytes, 1, 3);
      y += args.y_step;
      if (residual != nullptr) {
        for (std::int64_t i = 0; i < args.row_lines; ++i) __builtin_prefetch(residual + i * kLineBytes, 0, 3);
        residual += args.residual_step;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) step(i);
    for (int g = 0; g < kGroups; ++g) a[g] += kUnroll;
    panel += kUnroll * 2 * kVector;
  }
  for (; k > 0; --k) {
    step(0);
    for (int g = 0; g < kGroups; ++g) a[g] += 1;
    panel += 2 * kVector;
  }

#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      F sum = V::set(0.0f);
      if (c < C) {
        sum = acc[0][r][c < C ? c : 0];
#pragma GCC unroll 4
        for (int s = 1; s < kChains; ++s) sum = V::add(sum, acc[s][r][c < C ? c : 0]);
      }
      V::store(args.acc + (2 * r + c) * kVector, sum);
    }
}

}  // namespace prunekern
