// Scale, bias, activation, scatter, residual: from sums to y.
#pragma once

#include "kernels/kernel.h"
#include "kernels/math.h"

namespace prunekern {

// One row of acc, in place.
template <class V, Activation act>
inline void activate_row(float* acc, const typename V::F (&scale)[2], const typename V::F (&bias)[2]) {
  constexpr int kVector = V::kWidth;
  for (int c = 0; c < 2; ++c)
    V::store(acc + c * kVector, activate<V, act>(V::madd(V::load(acc + c * kVector), scale[c], bias[c])));
}

// One row of y. T: float or std::uint16_t (bf16, rounded to nearest even).
template <class V, class T>
inline void write_row(const EpilogueArgs& args, std::int64_t r) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
  constexpr std::uint32_t kFull = (1u << kVector) - 1;
  const float* acc = args.acc + r * 2 * kVector;
  const T* residual =
      args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + r * args.residual_stride;
  T* y = static_cast<T*>(args.y) + r * args.y_stride;
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

// acc lies in L1: writing it there costs 2 stores a row against 2 k FMAs, and lets the windows start at any
// of its columns. Two passes, so that no load meets a store still in flight.
template <class V, class T, Activation act>
void epilogue(const EpilogueArgs& args) {
  constexpr int kVector = V::kWidth;
  const typename V::F scale[2] = {V::load(args.scale), V::load(args.scale + kVector)};
  const typename V::F bias[2] = {V::load(args.bias), V::load(args.bias + kVector)};
  for (std::int64_t r = 0; r < args.rows; ++r) activate_row<V, act>(args.acc + r * 2 * kVector, scale, bias);
  for (std::int64_t r = 0; r < args.rows; ++r) write_row<V, T>(args, r);
}

}  // namespace prunekern
