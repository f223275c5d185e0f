#include "cpu/amx_self_test.h"

#include <cstdint>

#include "kernels/amx.h"

namespace prunekern {
namespace {

constexpr int kSteps = 3, kRows = 16, kWidth = 32;

// Integers of -8 .. 8 are exact in bf16, their products and sums in fp32.
float number(int i) { return static_cast<float>(i * 37 % 17 - 8); }

void put(float value, std::uint16_t& to) {  // bf16: the upper half
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  to = static_cast<std::uint16_t>(bits >> 16);
}
void put(float value, std::int8_t& to) { to = static_cast<std::int8_t>(value); }

float sum_at(const float* acc, Arithmetic arithmetic) {
  if (arithmetic != Arithmetic::int8) return *acc;
  std::int32_t sum;
  __builtin_memcpy(&sum, acc, 4);
  return static_cast<float>(sum);
}

// Products of two row tiles and of one. T: what is multiplied.
template <class T>
AmxSelfTest try_product(const Product& product) {
  constexpr int kInputs = 64 / sizeof(T), kTogether = 4 / sizeof(T);
  alignas(64) static T x[2 * kSteps * kRows * kInputs], panel[kSteps * kInputs * kWidth];
  alignas(64) static float acc[2 * kRows * kWidth];
  for (int r = 0; r < 2 * kRows; ++r)
    for (int k = 0; k < kSteps * kInputs; ++k)
      put(number(r * 101 + k),
          x[(r / kRows * kSteps + k / kInputs) * kRows * kInputs + r % kRows * kInputs + k % kInputs]);
  for (int k = 0; k < kSteps * kInputs; ++k)
    for (int n = 0; n < kWidth; ++n)
      put(number(n * 59 + k * 7), panel[(k / kTogether * kWidth + n) * kTogether + k % kTogether]);
  AmxSelfTest result;
  product.begin();
  for (int row_tiles = 2; row_tiles >= 1 && !result.failed; --row_tiles) {
    ProductArgs args{};
    args.x = reinterpret_cast<const char*>(x);
    args.row_tiles = row_tiles;
    args.row_tile_bytes = kSteps * product.step_bytes;
    args.panel = reinterpret_cast<const char*>(panel);
    args.readable = sizeof panel;
    args.k_steps = kSteps;
    args.acc = acc;
    product.multiply(args);
    for (int r = 0; r < row_tiles * kRows; ++r)
      for (int n = 0; n < kWidth; ++n) {
        float want = 0.0f;
        for (int k = 0; k < kSteps * kInputs; ++k) want += number(r * 101 + k) * number(n * 59 + k * 7);
        const float got = sum_at(acc + r * kWidth + n, product.arithmetic);
        if (got != want && !result.failed) result = {true, got, want};
      }
  }
  product.end();
  return result;
}

}  // namespace

AmxSelfTest amx_self_test() {
  const AmxSelfTest result = try_product<std::uint16_t>(kAmxBf16);
  return result.failed ? result : try_product<std::int8_t>(kAmxInt8);
}

}  // namespace prunekern
