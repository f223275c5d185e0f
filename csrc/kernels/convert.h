// From what lies in memory to what the tile multiplies: weights in fp32, rows of x without the columns that
// nobody reads.
#pragma once

#include "kernels/kernel.h"

namespace prunekern {

// 16 bits to the left make a bf16 a float: each 32-bit lane of a panel holds two, k and k + 1.
template <class V>
void widen_bf16(const WidenArgs& args) {
  constexpr int kWidth = 2 * V::kWidth;
  const std::uint16_t* from = static_cast<const std::uint16_t*>(args.panel);
  float* to = args.to;
  for (std::int64_t k = 0; k < args.k; k += 2, from += 2 * kWidth, to += 2 * kWidth)
    for (int c = 0; c < kWidth; c += V::kWidth) {
      V::store(to + c, V::load_even(from + 2 * c));
      V::store(to + kWidth + c, V::load_odd(from + 2 * c));
    }
}

// Whole groups of four inputs: where k is no multiple of them, the zeros after it too.
template <class V>
void widen_int8(const WidenArgs& args) {
  constexpr int kWidth = 2 * V::kWidth;
  const std::int8_t* from = static_cast<const std::int8_t*>(args.panel);
  float* to = args.to;
  for (std::int64_t k = 0; k < args.k; k += 4, from += 4 * kWidth, to += 4 * kWidth)
    for (int c = 0; c < kWidth; c += V::kWidth) {
      V::store(to + c, V::template load_one_of_four<0>(from + 4 * c));
      V::store(to + kWidth + c, V::template load_one_of_four<1>(from + 4 * c));
      V::store(to + 2 * kWidth + c, V::template load_one_of_four<2>(from + 4 * c));
      V::store(to + 3 * kWidth + c, V::template load_one_of_four<3>(from + 4 * c));
    }
}

// T: float or std::uint16_t (bf16).
template <class V, class T>
void take(const TakeArgs& args) {
  constexpr int kVector = V::kWidth;
  for (std::int64_t r = 0; r < args.rows; ++r) {
    const T* from = static_cast<const T*>(args.x) + r * args.x_stride;
    float* to = args.to + r * args.to_stride;
    if (args.reads == nullptr) {
      std::int64_t i = 0;
      for (; i + kVector <= args.columns; i += kVector) V::store(to + i, V::load(from + i));
      if (i < args.columns) V::store(to + i, V::load_part(from + i, static_cast<int>(args.columns - i)));
    } else if (args.columns < kVector) {
      for (std::int64_t i = 0; i < args.n_reads; ++i) {
        const Read& read = args.reads[i];
        V::store(to + read.target,
                 V::compress(V::load_part(from + read.column, static_cast<int>(args.columns)), read.mask));
      }
    } else {
      for (std::int64_t i = 0; i < args.n_reads; ++i) {
        const Read& read = args.reads[i];
        V::store(to + read.target, V::compress(V::load(from + read.column), read.mask));
      }
    }
  }
}

}  // namespace prunekern
