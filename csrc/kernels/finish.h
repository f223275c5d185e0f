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
};

// Sums in fp32 of x that is rounded by row.
template <class V>
struct RowScaledFloats {
  using F = typename V::F;
  RowScaledFloats(const char* tail, std::int64_t row)
      : scale(V::set(reinterpret_cast<const float*>(tail)[row])) {}
  F get(const float* acc, F by, F bias) const { return V::madd(V::load(acc), V::mul(scale, by), bias); }
  F scale;
};

// Sums in int32 of x that is rounded by row: its tail begins with the scale of each row. The scales first:
// their product leaves the range of fp32 only where y does, the sum times one of them before.
template <class V>
struct RowScaledSums {
  using F = typename V::F;
  RowScaledSums(const char* tail, std::int64_t row)
      : scale(V::set(reinterpret_cast<const float*>(tail)[row])) {}
  F get(const float* acc, F by, F bias) const { return V::madd(V::load_sums(acc), V::mul(scale, by), bias); }
  F scale;
};

// FinishFn. T: of y and the residual.
template <class V, class Sums, class T, Activation act>
void finish(Finish& one, std::int64_t rows) {
  constexpr int kVector = V::kWidth;
  const EpilogueArgs& args = one.args;
  const typename V::F scale[2] = {V::load(args.scale), V::load(args.scale + kVector)};
  const typename V::F bias[2] = {V::load(args.bias), V::load(args.bias + kVector)};
  for (; rows > 0 && one.written < args.rows; --rows) {
    if (one.activated < args.rows) {
      float* acc = args.acc + one.activated * 2 * kVector;
      const float* by = one.by == nullptr ? nullptr : one.by + one.activated * 2 * kVector;
      const Sums sums(one.tail, one.activated);
      for (int c = 0; c < 2; ++c) {
        typename V::F value = activate<V, act>(sums.get(acc + c * kVector, scale[c], bias[c]));
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
}

}  // namespace prunekern
