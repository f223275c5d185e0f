// The microkernels, written once for any vector type V and instantiated by generic.cpp, avx2.cpp, avx512.cpp.
//
// Those files are compiled for more than the baseline, and the linker keeps one copy of every inline
// function: nothing here may use an inline function of the standard library or one that is not a template
// over V, or an AVX-512 copy of it could end up in the path of a CPU without AVX-512.
#pragma once

#include "kernel.h"
#include "math.h"
#include "softmax.h"

namespace prunekern {

// One tile: R rows of a times one panel of two vectors, held in 2 R registers over the whole of k. With C = 1
// only the first vector of the panel is read: the last panel of a weight often holds no more than that.
//
// AVX-512, R = 14: 28 accumulators, 2 vectors of weights, 1 broadcast = 31 of 32 registers; 28 FMAs (14
// cycles) need 16 loads (8 cycles), so FMAs bind. Weights come from L2 at 128 bytes per 14 cycles (of about
// 48 a cycle).
template <class V, int R, int C>
void tile(const TileArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kUnroll = 4, kLineFloats = 16;
  // Three rows to a pointer: base, base + 4 stride, base + 8 stride are all x86 addressing modes, and five
  // pointers fit the integer registers where fourteen do not.
  constexpr int kGroups = (R + 2) / 3;
  const std::int64_t stride = args.a_stride;
  const float* a[kGroups];
  for (int g = 0; g < kGroups; ++g) a[g] = args.a + 3 * g * stride;
  const float* panel = args.panel;
  const float* next = args.next_weights;
  const float* y = args.y;
  const float* residual = args.residual;
  int rows_left = R;

  F acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = V::set(0.0f);

  auto step = [&](int k) __attribute__((always_inline)) {
    F weights[C];
    for (int c = 0; c < C; ++c) weights[c] = V::load(panel + (2 * k + c) * kVector);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const F x = V::set(a[r / 3][r % 3 * stride + k]);
      for (int c = 0; c < C; ++c) acc[r][c] = V::madd(x, weights[c], acc[r][c]);
    }
  };

  std::int64_t k = args.k;
  for (; k >= kUnroll; k -= kUnroll) {
    for (std::int64_t i = 0; i < args.next_lines; ++i, next += kLineFloats) __builtin_prefetch(next, 0, 2);
    // One row at a time: all rows at once fill the line buffers, and the loads of this loop wait behind them.
    if (rows_left-- > 0) {
      for (std::int64_t i = 0; i < args.row_lines; ++i) __builtin_prefetch(y + i * kLineFloats, 1, 3);
      y += args.y_stride;
      if (residual != nullptr) {
        for (std::int64_t i = 0; i < args.row_lines; ++i)
          __builtin_prefetch(residual + i * kLineFloats, 0, 3);
        residual += args.residual_stride;
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

  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 2; ++c)
      V::store(args.acc + (2 * r + c) * kVector, c < C ? acc[r][c < C ? c : 0] : V::set(0.0f));
}

// Bias, activation, scatter, residual. acc lies in L1: writing it there costs 2 stores a row against 2 k
// FMAs, and lets the windows start at any of its columns. Two passes, so that no load meets a store still in
// flight.
template <class V, Activation act>
void epilogue(const EpilogueArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
  constexpr std::uint32_t kFull = (1u << kVector) - 1;
  const F low = V::load(args.bias), high = V::load(args.bias + kVector);
  for (std::int64_t r = 0; r < args.rows; ++r) {
    float* acc = args.acc + r * 2 * kVector;
    V::store(acc, activate<V, act>(V::add(V::load(acc), low)));
    V::store(acc + kVector, activate<V, act>(V::add(V::load(acc + kVector), high)));
  }
  for (std::int64_t r = 0; r < args.rows; ++r) {
    const float* acc = args.acc + r * 2 * kVector;
    const float* residual = args.residual == nullptr ? nullptr : args.residual + r * args.residual_stride;
    float* y = args.y + r * args.y_stride;
    for (std::int64_t w = 0; w < args.n_windows; ++w) {
      const Window window = args.windows[w];
      if (window.width == kVector) {
        const float* source = acc + window.source;
        F value = window.mask == kFull ? V::load(source) : V::expand(source, window.mask);
        if (residual != nullptr) value = V::add(value, V::load(residual + window.column));
        V::store(y + window.column, value);
      } else {
        F value = V::expand(acc + window.source, window.mask);
        if (residual != nullptr) value = V::add(value, V::load_part(residual + window.column, window.width));
        V::store_part(y + window.column, value, window.width);
      }
    }
  }
}

// What the FMA units can do: twelve independent chains (two units, four or five cycles each) and no memory.
template <class V>
std::int64_t peak(std::int64_t steps) {
  constexpr int kChains = 12;
  typename V::F acc[kChains], scale = V::set(0.5f), one = V::set(1.0f);
  for (int i = 0; i < kChains; ++i) acc[i] = V::set(static_cast<float>(i));
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = V::madd(acc[i], scale, one);
  }
  float sink[V::kWidth];
  for (int i = 1; i < kChains; ++i) acc[0] = V::add(acc[0], acc[i]);
  V::store(sink, acc[0]);
  volatile float used = sink[0];  // or the compiler drops it all
  (void)used;
  return steps * kChains * V::kWidth * 2;
}

template <class V, int... R>
constexpr Kernels make_kernels() {
  Kernels kernels{};
  kernels.width = 2 * V::kWidth;
  kernels.vector = V::kWidth;
  kernels.rows = sizeof...(R);
  const TileFn half[] = {nullptr, tile<V, R, 1>...}, full[] = {nullptr, tile<V, R, 2>...};
  for (int r = 1; r <= kernels.rows; ++r) {
    kernels.half_tile[r] = half[r];
    kernels.tile[r] = full[r];
  }
  kernels.peak = peak<V>;
  static_assert(sizeof...(R) <= V::kWidth, "softmax keeps one lane for each row");
  kernels.attention = make_attention_kernels<V>();
  kernels.epilogue[0] = epilogue<V, Activation::none>;
  kernels.epilogue[1] = epilogue<V, Activation::relu>;
  kernels.epilogue[2] = epilogue<V, Activation::gelu>;
  kernels.epilogue[3] = epilogue<V, Activation::gelu_tanh>;
  kernels.epilogue[4] = epilogue<V, Activation::silu>;
  return kernels;
}

}  // namespace prunekern
