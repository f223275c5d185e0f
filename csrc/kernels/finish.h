// From the sums of a row tile to y, for any vector type V and kind of sums.
#pragma once

#include "kernels/epilogue.h"
#include "kernels/product.h"

namespace prunekern {

constexpr int kAhead = 2;  // rows activated before one is written: its stores have landed by then

// Sums as they are.
template <class V>
struct FloatSums {
  using F = typename V::F;
  FloatSums(const char*, std::int64_t) {}
  F get(const float* acc, F scale, F bias) const { return V::madd(V::load(acc), scale, bias); }
  // y in bf16 is coarse, too.
  template <class T, Activation act>
  static F activated(F x) {
    if constexpr (act == Activation::gelu && sizeof(T) == 2) return coarse_gelu<V>(x);
    return activate<V, act>(x);
  }
};

// Sums of x that is rounded by row: its tail begins with the scale of each row. The scales are multiplied
// first: their product leaves the range of fp32 only where y does, the sum times one of them before.
template <class V>
struct RowScaled {
  using F = typename V::F;
  RowScaled(const char* tail, std::int64_t row) : scale(V::set(reinterpret_cast<const float*>(tail)[row])) {}
  F get_of(F sum, F by, F bias) const { return V::madd(sum, V::mul(scale, by), bias); }
  template <class T, Activation act>
  static F activated(F x) {
    if constexpr (act == Activation::gelu) return coarse_gelu<V>(x);
    return activate<V, act>(x);
  }
  F scale;
};

// In fp32, or in int32.
template <class V>
struct RowScaledFloats : RowScaled<V> {
  using F = typename V::F;
  using RowScaled<V>::RowScaled;
  F get(const float* acc, F by, F bias) const { return this->get_of(V::load(acc), by, bias); }
};
template <class V>
struct RowScaledSums : RowScaled<V> {
  using F = typename V::F;
  using RowScaled<V>::RowScaled;
  F get(const float* acc, F by, F bias) const { return this->get_of(V::load_sums(acc), by, bias); }
};

// Whether a panel's sums go side by side into its two windows, and no other.
template <class V>
inline bool is_plain(const EpilogueArgs& args) {
  constexpr std::uint32_t kFull = (1u << V::kWidth) - 1;
  return args.n_windows == 2 && args.windows[0].mask == kFull && args.windows[1].mask == kFull;
}

// The same from sums straight to y: 14 rows of 32 channels in 260 to 340 cycles instead of 410 (EPYC).
template <class V, class Sums, class T, Activation act>
void finish_plain(Finish& one, std::int64_t rows) {
  constexpr int kVector = V::kWidth;
  const EpilogueArgs& args = one.args;
  const typename V::F scale[2] = {V::load(args.scale), V::load(args.scale + kVector)};
  const typename V::F bias[2] = {V::load(args.bias), V::load(args.bias + kVector)};
  const std::int64_t column[2] = {args.windows[0].column, args.windows[1].column};
  const std::int64_t end = one.written + rows < args.rows ? one.written + rows : args.rows;
  const float* acc = args.acc + one.written * 2 * kVector;
  const float* by = one.by == nullptr ? nullptr : one.by + one.written * 2 * kVector;
  T* y = static_cast<T*>(args.y) + one.written * args.y_stride;
  const T* residual = args.residual == nullptr
                          ? nullptr
                          : static_cast<const T*>(args.residual) + one.written * args.residual_stride;
  for (std::int64_t r = one.written; r < end; ++r) {
    const Sums sums(one.tail, r);
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      typename V::F value = Sums::template activated<T, act>(sums.get(acc + c * kVector, scale[c], bias[c]));
      if (by != nullptr) value = V::mul(value, V::load(by + c * kVector));
      if (residual != nullptr) value = V::add(value, V::load(residual + column[c]));
      V::store(y + column[c], value);
    }
    acc += 2 * kVector;
    if (by != nullptr) by += 2 * kVector;
    if (residual != nullptr) residual += args.residual_stride;
    y += args.y_stride;
  }
  one.activated = one.written = end;
}

// FinishFn. T: of y and the residual.
template <class V, class Sums, class T, Activation act>
void finish(Finish& one, std::int64_t rows) {
  constexpr int kVector = V::kWidth;
  const EpilogueArgs& args = one.args;
  if (!one.keep && one.activated == one.written && is_plain<V>(args))
    return finish_plain<V, Sums, T, act>(one, rows);
  const typename V::F scale[2] = {V::load(args.scale), V::load(args.scale + kVector)};
  const typename V::F bias[2] = {V::load(args.bias), V::load(args.bias + kVector)};
  for (; rows > 0 && one.written < args.rows; --rows) {
    if (one.activated < args.rows) {
      float* acc = args.acc + one.activated * 2 * kVector;
      const float* by = one.by == nullptr ? nullptr : one.by + one.activated * 2 * kVector;
      const Sums sums(one.tail, one.activated);
      for (int c = 0; c < 2; ++c) {
        typename V::F value =
            Sums::template activated<T, act>(sums.get(acc + c * kVector, scale[c], bias[c]));
        if (by != nullptr) value = V::mul(value, V::load(by + c * kVector));
        V::store(acc + c * kVector, value);
      }
      ++one.activated;
    }
    if (one.keep)
      one.written = one.activated;
    else if (one.activated - one.written > kAhead || one.activated == args.rows)
      write_row<V, T>(args, one.written++);
  }
}

// Multiply of a Product D of one row tile: every finish before, then the tile for the rows that are there.
// tiles: by rows, from 1.
template <class D, int N>
inline void run_rows(const MultiplyFn (&tiles)[N], const ProductArgs& args) {
  static_assert(N == D::kRows + 1, "a tile for every number of rows");
  for (std::int64_t i = 0; i < args.n_before; ++i) {
    Finish& one = args.before[i];
    if (one.written < one.args.rows) args.finish(one, D::kRows + kAhead);
  }
  tiles[args.rows < D::kRows ? args.rows : D::kRows](args);
}

template <class V, class Sums, class T>
constexpr void fill_finishes(FinishFn (&table)[kActivations]) {
  table[0] = finish<V, Sums, T, Activation::none>;
  table[1] = finish<V, Sums, T, Activation::relu>;
  table[2] = finish<V, Sums, T, Activation::gelu>;
  table[3] = finish<V, Sums, T, Activation::gelu_tanh>;
  table[4] = finish<V, Sums, T, Activation::silu>;
  table[5] = finish<V, Sums, T, Activation::quick_gelu>;
}

}  // namespace prunekern
