// Any CPU: the vector type in plain C++, four floats that the compiler turns into SSE2, NEON or whatever
// there is.
#pragma once

#include <cstdint>

namespace prunekern {
namespace {  // each file its own copy

struct Generic {
  static constexpr int kWidth = 4;
  struct F {
    float v[4];
  };

  template <class Fn>
  static inline F each(Fn fn) {
    F out;
    for (int i = 0; i < 4; ++i) out.v[i] = fn(i);
    return out;
  }
  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, F a) {
    for (int i = 0; i < 4; ++i) p[i] = a.v[i];
  }
  static F load_part(const float* p, int n) {
    return each([&](int i) { return i < n ? p[i] : 0.0f; });
  }
  static void store_part(float* p, F a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
  }
  // Input I of the four that each channel of an int8 panel has side by side.
  template <int I>
  static F load_one_of_four(const std::int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[4 * i + I]); });
  }
  // Lanes of eight codes of four bits: the one at this bit of each.
  template <int Shift>
  static F load_code(const char* p) {
    return each([&](int i) { return static_cast<float>(p[4 * i + Shift / 8] >> Shift % 8 & 15); });
  }
  // fp16: numbers, NaN and infinities; 2^-24 is one step of those without an exponent.
  static float from_half(std::uint16_t value) {
    const std::uint32_t exponent = value >> 10 & 31, fraction = value & 1023;
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000) << 16;
    float result = static_cast<float>(fraction) * 0x1p-24f;
    std::uint32_t bits = ((exponent == 31 ? 255 : exponent + 112) << 23) | fraction << 13;
    if (exponent == 0) __builtin_memcpy(&bits, &result, 4);
    bits |= sign;
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
  static F load_half(const char* p) {
    return each([&](int i) {
      std::uint16_t half;
      __builtin_memcpy(&half, p + 2 * i, 2);
      return from_half(half);
    });
  }
  // Sums in int32.
  static F load_sums(const float* p) {
    return each([&](int i) {
      std::int32_t sum;
      __builtin_memcpy(&sum, p + i, 4);
      return static_cast<float>(sum);
    });
  }

  // bf16: the upper half of a float.
  static float from_bf16(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
  static std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (value != value)
      return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // rounding could make it infinite
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static F load(const std::uint16_t* p) {
    return each([&](int i) { return from_bf16(p[i]); });
  }
  static F load_part(const std::uint16_t* p, int n) {
    return each([&](int i) { return i < n ? from_bf16(p[i]) : 0.0f; });
  }
  static void store(std::uint16_t* p, F a) {
    for (int i = 0; i < 4; ++i) p[i] = to_bf16(a.v[i]);
  }
  static void store_part(std::uint16_t* p, F a, int n) {
    for (int i = 0; i < n; ++i) p[i] = to_bf16(a.v[i]);
  }
  static F load_even(const std::uint16_t* p) {
    return each([&](int i) { return from_bf16(p[2 * i]); });
  }
  static F load_odd(const std::uint16_t* p) {
    return each([&](int i) { return from_bf16(p[2 * i + 1]); });
  }

  // The values whose bit is set, moved together; the rest is zero.
  static F compress(F a, std::uint32_t mask) {
    F out = set(0.0f);
    int next = 0;
    for (int i = 0; i < 4; ++i)
      if (mask >> i & 1) out.v[next++] = a.v[i];
    return out;
  }
  // The bits of mask take consecutive values from p; the rest is zero.
  static F expand(const float* p, std::uint32_t mask) {
    return each([&](int i) { return mask >> i & 1 ? *p++ : 0.0f; });
  }
  static F zip_low(F a, F b) {  // a0 b0 a1 b1
    return {{a.v[0], b.v[0], a.v[1], b.v[1]}};
  }
  static F zip_high(F a, F b) { return {{a.v[2], b.v[2], a.v[3], b.v[3]}}; }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F negative(F a) {
    return each([&](int i) { return -a.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F abs(F a) {
    return each([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
  }
  static F madd(F a, F b, F c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  // The exact product exp and gelu rely on; in double it is exact without an FMA instruction.
  static F fma(F a, F b, F c) {
    return each([&](int i) { return static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]); });
  }
  static F round(F a) {
    return each([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });  // 1.5 * 2^23; |a| < 2^22
  }
  static F scale(F a, F n) {  // a * 2^n, n integral in [-153, 129]
    return each([&](int i) {
      const int power = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0;
      const int half = power / 2;
      return a.v[i] * __builtin_ldexpf(1.0f, half) * __builtin_ldexpf(1.0f, power - half);
    });
  }
  static std::uint32_t size_bits(float a) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    return bits & 0x7fffffffu;
  }
  // max(a, |b|) of the bits, a not negative; and the largest lane of those.
  static F max_size_bits(F a, F b) {
    return each([&](int i) { return size_bits(a.v[i]) >= size_bits(b.v[i]) ? a.v[i] : abs(b).v[i]; });
  }
  static std::uint32_t largest_bits(F a) {
    std::uint32_t most = 0;
    for (int i = 0; i < 4; ++i) most = size_bits(a.v[i]) > most ? size_bits(a.v[i]) : most;
    return most;
  }
  static F mix(F a, F b) {  // of bits, for a checksum
    return each([&](int i) {
      std::uint32_t x, y;
      __builtin_memcpy(&x, &a.v[i], 4);
      __builtin_memcpy(&y, &b.v[i], 4);
      x ^= y;
      float result;
      __builtin_memcpy(&result, &x, 4);
      return result;
    });
  }
  static F select_positive(F x, F yes, F no) {
    return each([&](int i) { return x.v[i] > 0 ? yes.v[i] : no.v[i]; });
  }
};

}  // namespace
}  // namespace prunekern
