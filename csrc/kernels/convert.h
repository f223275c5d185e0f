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

// What is stored is code = q + 8, and every product with a scale is exact: 4 bits times 11.
template <class V, int Shift>
inline void widen_codes(const char* from, const typename V::F (&scale)[2], float* to) {
  const typename V::F eight = V::set(8.0f);
  V::store(to, V::mul(V::sub(V::template load_code<Shift>(from), eight), scale[0]));
  V::store(to + V::kWidth,
           V::mul(V::sub(V::template load_code<Shift>(from + 4 * V::kWidth), eight), scale[1]));
}

// Whole groups of 32 inputs, scales included.
template <class V>
void widen_int4(const WidenArgs& args) {
  constexpr int kWidth = 2 * V::kWidth;
  const char* from = static_cast<const char*>(args.panel);
  float* to = args.to;
  for (std::int64_t k = 0; k < args.k; k += 32, from += 2 * kWidth, to += 16 * kWidth) {
    const char* scales = from + 16 * kWidth;
    const typename V::F scale[2] = {V::load_half(scales), V::load_half(scales + 2 * V::kWidth)};
    for (int four = 0; four < 4; ++four, from += 4 * kWidth, to += 4 * kWidth) {
      widen_codes<V, 0>(from, scale, to);
      widen_codes<V, 8>(from, scale, to + kWidth);
      widen_codes<V, 16>(from, scale, to + 2 * kWidth);
      widen_codes<V, 24>(from, scale, to + 3 * kWidth);
      widen_codes<V, 4>(from, scale, to + 16 * kWidth);
      widen_codes<V, 12>(from, scale, to + 17 * kWidth);
      widen_codes<V, 20>(from, scale, to + 18 * kWidth);
      widen_codes<V, 28>(from, scale, to + 19 * kWidth);
    }
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
