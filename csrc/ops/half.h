// fp16 in memory: rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace prunekern {

inline float from_half(std::uint16_t value) {
  const int exponent = value >> 10 & 31, fraction = value & 1023;
  const float size = exponent == 31  ? (fraction == 0 ? HUGE_VALF : NAN)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return value & 0x8000 ? -size : size;
}

// What is too large becomes an infinity.
inline std::uint16_t to_half(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);                             // size < 2^exponent
  const int last = size < 0x1p-14f ? -24 : exponent - 11;  // the power of two of the last bit
  const long steps = std::lrint(std::ldexp(size, -last));  // up to 2048, which carries into the exponent
  return static_cast<std::uint16_t>(sign + ((last + 24) << 10) + steps);
}

}  // namespace prunekern
