// Rows of x as int8 products want them: rounded to int8 by row while they are laid out as row tiles.
#pragma once

#include "kernels/product.h"

namespace prunekern {

// What a row tile says of its rows: x = q * scale; start: what the sums of a row begin with.
template <int rows>
struct RowTail {
  float scale[rows];
  std::int32_t start[rows];
};

// The largest |x| of a row; NaN where one is NaN or infinite. By the bits, whose order is that of sizes, with
// infinity and NaN at the end. Four vectors at a time, as each waits for the one before.
template <class V, class T>
inline float largest_of(const T* x, std::int64_t k) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kAtOnce = 4;
  F most[kAtOnce];
#pragma GCC unroll 4
  for (int i = 0; i < kAtOnce; ++i) most[i] = V::set(0.0f);
  std::int64_t at = 0;
  for (; at + kAtOnce * kVector <= k; at += kAtOnce * kVector)
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) most[i] = V::max_size_bits(most[i], V::load(x + at + i * kVector));
  for (; at + kVector <= k; at += kVector) most[0] = V::max_size_bits(most[0], V::load(x + at));
  if (at < k) most[1] = V::max_size_bits(most[1], V::load_part(x + at, static_cast<int>(k - at)));
  const F all = V::max_size_bits(V::max_size_bits(most[0], most[1]), V::max_size_bits(most[2], most[3]));
  const std::uint32_t bits = V::largest_bits(all);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  return bits < 0x7f800000u ? largest : __builtin_nanf("");
}

// How a row is rounded: q = nearest even of x * (127 / largest), scale = largest / 127. Nothing above 1e-36:
// zeros, as 127 / largest is no fp32 number then. NaN or an infinity: scale NaN, which makes the whole row of
// y NaN.
template <class V>
struct Rounding {
  float scale;
  bool is_some;  // else q is 0 throughout
  typename V::F inverse;
};

template <class V, class T>
inline Rounding<V> rounding_of(const T* x, std::int64_t k) {
  const float largest = largest_of<V>(x, k);
  const bool is_finite = largest == largest, is_some = is_finite && largest > 1e-36f;
  return {is_some     ? largest / 127.0f
          : is_finite ? 0.0f
                      : largest,
          is_some, V::set(is_some ? 127.0f / largest : 0.0f)};
}

// One row. D::put rounds one vector to where its groups belong and adds it to D's totals. Returns the sum of
// q.
template <class D, class T>
inline std::int32_t quantize_row(const T* x, std::int64_t k, char* to, float& scale) {
  using V = typename D::V;
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kInputs = D::kGroups * D::kGroupInputs;
  constexpr std::int64_t kVectorBytes = D::kGroupBytes * (kVector / D::kGroupInputs);
  constexpr std::int64_t kStepBytes = D::kRows * D::kGroups * D::kGroupBytes;
  const Rounding<V> rounding = rounding_of<V>(x, k);
  scale = rounding.scale;
  typename D::Sum total = D::zero();
  std::int64_t at = 0;
  if (rounding.is_some)
    for (; at + kInputs <= k; at += kInputs, to += kStepBytes)
#pragma GCC unroll 4
      for (int i = 0; i < kInputs / kVector; ++i)
        D::put(to + i * kVectorBytes, V::mul(V::load(x + at + i * kVector), rounding.inverse), total);
  for (; at < k; at += kInputs, to += kStepBytes)
    for (int i = 0; i < kInputs / kVector; ++i) {
      const std::int64_t left = k - at - i * kVector;
      F value = V::set(0.0f);
      if (rounding.is_some && left > 0)
        value = left >= kVector ? V::load(x + at + i * kVector)
                                : V::load_part(x + at + i * kVector, static_cast<int>(left));
      D::put(to + i * kVectorBytes, V::mul(value, rounding.inverse), total);
    }
  return D::sum(total);
}

template <class D, class T>
void quantize_rows(const PrepareArgs& args) {
  constexpr std::int64_t kInputs = D::kGroups * D::kGroupInputs, kRows = D::kRows;
  const std::int64_t tiles_bytes = (args.k + kInputs - 1) / kInputs * D::kGroups * kRows * D::kGroupBytes;
  char* tile = args.to;
  for (std::int64_t first = 0; first < args.rows; first += kRows, tile += tiles_bytes + D::kTailBytes) {
    auto* tail = reinterpret_cast<RowTail<D::kRows>*>(tile + tiles_bytes);
    for (std::int64_t r = 0; r < kRows && first + r < args.rows; ++r) {
      const T* x = static_cast<const T*>(args.x) + (first + r) * args.x_stride;
      char* to = tile + r * D::kGroups * D::kGroupBytes;
      const std::int32_t sum = quantize_row<D, T>(x, args.k, to, tail->scale[r]);
      // It may pass the range of int32 (127 times 133,143 inputs), as the sums on the way from it do: they
      // wrap around, and end within.
      tail->start[r] = static_cast<std::int32_t>(static_cast<std::uint32_t>(D::kUnsignedOffset) *
                                                 static_cast<std::uint32_t>(sum));
    }
  }
}

}  // namespace prunekern
