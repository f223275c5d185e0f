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

// How a row is rounded: q = nearest even of x * (127 / largest), scale = largest / 127. Nothing above 1e-36:
// zeros, as 127 / largest is no fp32 number then. NaN or an infinity: scale NaN, which makes the whole row of
// y NaN. rest: of k inputs those after the last whole vector.
template <class V>
struct Rounding {
  using F = typename V::F;
  float scale;
  bool some;  // else q is 0 throughout
  F inverse;

  F of(F value) const { return some ? V::round(V::mul(value, inverse)) : V::set(0.0f); }
};

template <class V, class T>
inline Rounding<V> rounding_of(const T* x, std::int64_t k, typename V::F rest) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
  const std::int64_t whole = k / kVector * kVector;
  const F zero = V::set(0.0f);
  F size = V::abs(rest), spoilt = V::mul(rest, zero);  // NaN where a value is not finite
  for (std::int64_t i = 0; i < whole; i += kVector) {
    const F value = V::load(x + i);
    size = V::max(size, V::abs(value));
    spoilt = V::madd(value, zero, spoilt);
  }
  float lanes[kVector], checks[kVector];
  V::store(lanes, size);
  V::store(checks, spoilt);
  float largest = lanes[0], check = checks[0];
  for (int i = 1; i < kVector; ++i) {
    largest = lanes[i] > largest ? lanes[i] : largest;
    check += checks[i];
  }
  const bool finite = check == check, some = finite && largest > 1e-36f;
  return {!finite ? __builtin_nanf("")
          : some  ? largest / 127.0f
                  : 0.0f,
          some, V::set(some ? 127.0f / largest : 0.0f)};
}

// One row. D::put lays one vector of q out at `to`, groups of D::kGroupInputs a row tile's width apart.
// Returns the sum of q.
template <class D, class T>
inline std::int32_t quantize_row(const T* x, std::int64_t k, char* to, float& scale) {
  using V = typename D::V;
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
  constexpr std::int64_t kBytes =
      D::kRows * D::kGroupBytes * (kVector / D::kGroupInputs);  // from vector to vector
  const std::int64_t whole = k / kVector * kVector;
  const F rest = V::load_part(x + whole, static_cast<int>(k - whole));
  const Rounding<V> rounding = rounding_of<V>(x, k, rest);
  scale = rounding.scale;
  F total = V::set(0.0f);
  for (std::int64_t i = 0; i < whole; i += kVector, to += kBytes) {
    const F q = rounding.of(V::load(x + i));
    total = V::add(total, q);
    D::put(to, q);
  }
  const std::int64_t padded = (k + D::kGroups * D::kGroupInputs - 1) / (D::kGroups * D::kGroupInputs) *
                              (D::kGroups * D::kGroupInputs);
  for (std::int64_t i = whole; i < padded; i += kVector, to += kBytes) {
    const F q = i == whole ? rounding.of(rest) : V::set(0.0f);
    total = V::add(total, q);
    D::put(to, q);
  }
  float lanes[kVector];
  V::store(lanes, total);
  std::int32_t sum = 0;
  for (int i = 0; i < kVector; ++i) sum += static_cast<std::int32_t>(lanes[i]);
  return sum;
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
      const std::int32_t sum = quantize_row<D, T>(x, args.k, tile + r * D::kGroupBytes, tail->scale[r]);
      tail->start[r] = D::kUnsignedOffset * sum;
    }
  }
}

}  // namespace prunekern
