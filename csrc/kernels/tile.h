// The microkernels, written once for any vector type V and instantiated by generic.cpp, avx2.cpp, avx512.cpp.
//
// Those files are compiled for more than the baseline, and the linker keeps one copy of every inline function:
// nothing here may use an inline function of the standard library or one that is not a template over V, or an
// AVX-512 copy of it could end up in the path of a CPU without AVX-512.
#pragma once

#include "kernel.h"
#include "math.h"

namespace prunekern {

// One tile: R rows of a times one panel of two vectors, held in 2 R registers over the whole of k.
//
// AVX-512, R = 14: 28 accumulators, 2 vectors of weights, 1 broadcast = 31 of 32 registers; 28 FMAs (14 cycles)
// need 16 loads (8 cycles), so FMAs bind. Weights come from L2 at 128 bytes per 14 cycles (of about 48 a cycle).
template <class V, int R>
void tile(const TileArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kUnroll = 4;
  // Three rows to a pointer: base, base + 4 stride, base + 8 stride are all x86 addressing modes, and five
  // pointers fit the integer registers where fourteen do not.
  constexpr int kGroups = (R + 2) / 3;
  const std::int64_t stride = args.a_stride;
  const float* a[kGroups];
  for (int g = 0; g < kGroups; ++g) a[g] = args.a + 3 * g * stride;
  const float* panel = args.panel;
  const char* ahead = reinterpret_cast<const char*>(args.prefetch);
  const std::int64_t lines = args.prefetch_lines;

  F acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V::set(0.0f);

  auto step = [&](int k) __attribute__((always_inline)) {
    const F low = V::load(panel + k * 2 * kVector), high = V::load(panel + k * 2 * kVector + kVector);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const F x = V::set(a[r / 3][r % 3 * stride + k]);
      acc[r][0] = V::madd(x, low, acc[r][0]);
      acc[r][1] = V::madd(x, high, acc[r][1]);
    }
  };

  std::int64_t k = args.k;
  for (; k >= kUnroll; k -= kUnroll) {
    for (std::int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
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

  for (int r = 0; r < R; ++r) {
    V::store(args.acc + r * 2 * kVector, acc[r][0]);
    V::store(args.acc + r * 2 * kVector + kVector, acc[r][1]);
  }
}

// Bias, activation, scatter, residual. acc lies in L1: writing it there costs 2 stores a row against 2 k FMAs,
// and lets the windows start at any of its columns. Two passes, so that no load meets a store still in flight.
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

template <class V, int... R>
constexpr Kernels make_kernels() {
  Kernels kernels{};
  kernels.width = 2 * V::kWidth;
  kernels.vector = V::kWidth;
  kernels.rows = sizeof...(R);
  const TileFn tiles[] = {nullptr, tile<V, R>...};
  for (int r = 1; r <= kernels.rows; ++r) kernels.tile[r] = tiles[r];
  kernels.epilogue[0] = epilogue<V, Activation::none>;
  kernels.epilogue[1] = epilogue<V, Activation::relu>;
  kernels.epilogue[2] = epilogue<V, Activation::gelu>;
  kernels.epilogue[3] = epilogue<V, Activation::gelu_tanh>;
  kernels.epilogue[4] = epilogue<V, Activation::silu>;
  return kernels;
}

}  // namespace prunekern
