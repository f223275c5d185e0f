#include "cpu/amx_self_test.h"

#include <cstdint>

#include "kernels/amx.h"

namespace prunekern {
namespace {

constexpr int kSteps = 3, kRows = 16, kInputs = 32, kWidth = 32;

// Integers of -8 .. 8 are exact in bf16, their products and sums in fp32.
float number(int i) { return static_cast<float>(i * 37 % 17 - 8); }

std::uint16_t upper_half(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}

}  // namespace

AmxSelfTest amx_self_test() {
  alignas(64) static std::uint16_t x[2 * kSteps * kRows * kInputs], panel[kSteps * kInputs * kWidth];
  alignas(64) static float acc[2 * kRows * kWidth];
  for (int r = 0; r < 2 * kRows; ++r)
    for (int k = 0; k < kSteps * kInputs; ++k)
      x[(r / kRows * kSteps + k / kInputs) * kRows * kInputs + r % kRows * kInputs + k % kInputs] =
          upper_half(number(r * 101 + k));
  for (int k = 0; k < kSteps * kInputs; ++k)
    for (int n = 0; n < kWidth; ++n)
      panel[(k / 2 * kWidth + n) * 2 + k % 2] = upper_half(number(n * 59 + k * 7));
  AmxSelfTest result;
  kAmxBf16.begin();
  for (int row_tiles = 2; row_tiles >= 1 && !result.failed; --row_tiles) {
    ProductArgs args{};
    args.x = reinterpret_cast<const char*>(x);
    args.row_tiles = row_tiles;
    args.row_tile_bytes = kSteps * kAmxBf16.step_bytes;
    args.panel = reinterpret_cast<const char*>(panel);
    args.k_steps = kSteps;
    args.acc = acc;
    kAmxBf16.multiply(args);
    for (int r = 0; r < row_tiles * kRows; ++r)
      for (int n = 0; n < kWidth; ++n) {
        float want = 0.0f;
        for (int k = 0; k < kSteps * kInputs; ++k) want += number(r * 101 + k) * number(n * 59 + k * 7);
        if (acc[r * kWidth + n] != want && !result.failed) result = {true, acc[r * kWidth + n], want};
      }
  }
  kAmxBf16.end();
  return result;
}

}  // namespace prunekern
