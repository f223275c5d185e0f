#include "ops/int4.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "loops/panels.h"
#include "ops/half.h"

namespace prunekern {
namespace {

// What the weight that is largest in size may become, in steps. -8 is there and 8 is not: it takes the sign
// that has one value more. -8 for all gives 21.3 dB of normal weights, the best of these four and the fit
// that follows 21.8, as much as five or seven would. All that the largest q can be is among them, so that
// weights that are rounded already come out as they are.
constexpr float kSteps[] = {-8.5f, -8.0f, -7.0f, -6.0f};
constexpr float kLeastSteps = 6.0f;

constexpr std::int64_t kHalfGroup = kInt4Group / 2;
constexpr std::uint16_t kNan = 0x7e00;

float rounded(float value, float scale) {
  return scale == 0.0f ? 0.0f : std::clamp(std::nearbyint(value / scale), -8.0f, 7.0f);
}

float loss(const float (&w)[kInt4Group], float scale) {
  float sum = 0.0f;
  for (float value : w) {
    const float error = value - rounded(value, scale) * scale;
    sum += error * error;
  }
  return sum;
}

// Where things stand in a panel, and in a group of one.
std::int64_t group_at(std::int64_t width, std::int64_t group) {
  return inputs_bytes(WeightType::int4, width, group * kInt4Group);
}
std::int64_t byte_at(std::int64_t width, std::int64_t channel, std::int64_t i) {
  return (i / 4 * width + channel) * 4 + i % 4;
}

}  // namespace

std::uint16_t to_int4(const float* weight, std::int64_t stride, std::int64_t count,
                      std::uint8_t (&codes)[kInt4Group]) {
  float w[kInt4Group] = {}, largest = 0.0f;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    w[i] = weight[i * stride];
    finite &= std::isfinite(w[i]);
    if (std::fabs(w[i]) > std::fabs(largest)) largest = w[i];
  }
  std::fill(codes, codes + kInt4Group, std::uint8_t{8});
  if (!finite || std::fabs(largest / kLeastSteps) > 65504.0f) return kNan;
  float scale = 0.0f, least = HUGE_VALF;
  for (float steps : kSteps) {
    const float one = from_half(to_half(largest / steps)), lost = loss(w, one);
    if (lost < least) {
      scale = one;
      least = lost;
    }
  }
  // The scale that fits these q best.
  float product = 0.0f, square = 0.0f;
  for (float value : w) {
    const float q = rounded(value, scale);
    product += value * q;
    square += q * q;
  }
  const float fitted = from_half(to_half(square > 0.0f ? product / square : 0.0f));
  if (std::isfinite(fitted) && std::fabs(rounded(largest, fitted)) >= kLeastSteps) scale = fitted;
  for (std::int64_t i = 0; i < kInt4Group; ++i)
    codes[i] = static_cast<std::uint8_t>(rounded(w[i], scale) + 8.0f);
  return to_half(scale);
}

void pack_int4(const float* weight, std::int64_t row_stride, std::int64_t column_stride, std::int64_t n,
               std::int64_t k, std::int64_t width, char* packed) {
  const std::int64_t bytes = panel_bytes(WeightType::int4, width, k);
  for (std::int64_t first = 0; first < n; first += width, packed += bytes) {
    const std::int64_t real = std::min(width, n - first);
    for (std::int64_t g = 0; g * kInt4Group < k; ++g) {
      char* group = packed + group_at(width, g);
      char* scales = group + kHalfGroup * width;
      if (real < width) {
        std::memset(group, 0x88, static_cast<std::size_t>(kHalfGroup * width));
        std::memset(scales, 0, static_cast<std::size_t>(2 * width));
      }
      for (std::int64_t c = 0; c < real; ++c) {
        std::uint8_t codes[kInt4Group];
        const std::uint16_t scale =
            to_int4(weight + (first + c) * row_stride + g * kInt4Group * column_stride, column_stride,
                    std::min(kInt4Group, k - g * kInt4Group), codes);
        std::memcpy(scales + 2 * c, &scale, 2);
        for (std::int64_t i = 0; i < kHalfGroup; ++i)
          group[byte_at(width, c, i)] = static_cast<char>(codes[i] | codes[i + kHalfGroup] << 4);
      }
    }
  }
}

void unpack_int4(const char* packed, std::int64_t n, std::int64_t k, std::int64_t width, float* weight) {
  const std::int64_t bytes = panel_bytes(WeightType::int4, width, k);
  for (std::int64_t channel = 0; channel < n; ++channel)
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t c = channel % width, i = j % kInt4Group;
      const char* group = packed + channel / width * bytes + group_at(width, j / kInt4Group);
      std::uint16_t scale;
      std::memcpy(&scale, group + kHalfGroup * width + 2 * c, 2);
      const int both = static_cast<unsigned char>(group[byte_at(width, c, i % kHalfGroup)]);
      const int code = i < kHalfGroup ? both & 15 : both >> 4;
      weight[channel * k + j] = static_cast<float>(code - 8) * from_half(scale);
    }
}

}  // namespace prunekern
