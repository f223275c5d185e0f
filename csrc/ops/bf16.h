// bf16 in memory: the upper half of a float, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace prunekern {

inline float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // NaN: rounding could make it infinite
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace prunekern
