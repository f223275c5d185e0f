// CHECK and a float64 reference: all the C++ tests need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "prunekern/prunekern.h"

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s\n  ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                     \
      std::fprintf(stderr, "\n");                                            \
      std::exit(1);                                                          \
    }                                                                        \
  } while (0)

// The message of what `action` throws; fails the test where it throws nothing.
template <class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  CHECK(false, "nothing was thrown");
  return "";
}

inline std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

// `count` of 0 .. size - 1, ascending.
inline std::vector<std::int64_t> random_kept(std::int64_t count, std::int64_t size, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t left = size - i, wanted = count - static_cast<std::int64_t>(kept.size());
    if (static_cast<std::int64_t>(engine() % static_cast<unsigned>(left)) < wanted) kept.push_back(i);
  }
  return kept;
}

// bf16, written apart from the code it checks: the float whose lower half is zero, nearest, ties to even.
inline std::uint16_t bf16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  const std::uint32_t lower = bits & 0xffff;
  std::uint32_t upper = bits >> 16;
  if (lower > 0x8000 || (lower == 0x8000 && upper % 2 == 1)) ++upper;
  return static_cast<std::uint16_t>(upper);
}

inline float float_of(std::uint16_t bf16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline double activate_reference(prunekern::Activation activation, double x) {
  using prunekern::Activation;
  switch (activation) {
    case Activation::relu:
      return x > 0 || std::isnan(x) ? x : 0.0;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: {
      const double z = std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
      return x / (1.0 + std::exp(-2.0 * z));
    }
    case Activation::silu:
      return x / (1.0 + std::exp(-x));
    case Activation::quick_gelu:
      return x / (1.0 + std::exp(-1.702 * x));
    default:
      return x;
  }
}
