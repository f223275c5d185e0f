#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "loops/huge_pages.h"
#include "loops/panels.h"
#include "ops/bf16.h"
#include "ops/int4.h"
#include "prunekern/linear.h"

namespace prunekern {

namespace {

// Where weight (channel c of its panel, input j) stands in the panel.
std::int64_t place(WeightType type, std::int64_t width, std::int64_t c, std::int64_t j) {
  const std::int64_t together = layout(type).side_by_side;
  return (j / together * width + c) * together + j % together;
}

// One step of a channel's int8 values. NaN where a weight is NaN or infinite: the channel gives NaN then. 0
// for a channel of zeros, or one so small (under 1e-43) that its step underflows: it gives zero, plus the
// bias.
float int8_scale(const float* channel, std::int64_t stride, std::int64_t k) {
  float largest = 0.0f;
  bool finite = true;
  for (std::int64_t j = 0; j < k; ++j) {
    const float size = std::fabs(channel[j * stride]);
    finite &= size <= std::numeric_limits<float>::max();
    largest = std::max(largest, size);
  }
  return finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

// Clamped: where the step is subnormal it has few bits, and the largest weight may be 190 steps.
std::int8_t to_int8(float value, float scale) {
  if (!(scale > 0.0f)) return 0;
  return static_cast<std::int8_t>(std::lrint(std::clamp(value / scale, -127.0f, 127.0f)));
}

}  // namespace

std::int64_t packed_bytes(Isa isa, WeightType type, std::int64_t n, std::int64_t k) {
  const std::int64_t width = panel_width(isa);
  return ceil_div(n, width) * panel_bytes(type, width, k);
}

void pack_weight(Isa isa, WeightType type, const float* weight, std::int64_t row_stride,
                 std::int64_t column_stride, std::int64_t n, std::int64_t k, void* packed, float* scale) {
  const std::int64_t width = panel_width(isa), panel = width * padded_k(type, k);
  prefer_huge_pages(packed, packed_bytes(isa, type, n, k));
  if (type == WeightType::int4)
    return pack_int4(weight, row_stride, column_stride, n, k, width, static_cast<char*>(packed));
  for (std::int64_t first = 0; first < n; first += width) {
    const std::int64_t real = std::min(width, n - first), start = first / width * panel;
    if (type == WeightType::int8) {
      for (std::int64_t c = 0; c < real; ++c)
        scale[first + c] = int8_scale(weight + (first + c) * row_stride, column_stride, k);
    }
    if (panel > 0 && (real < width || padded_k(type, k) != k))
      std::memset(static_cast<char*>(packed) + first / width * panel_bytes(type, width, k), 0,
                  static_cast<std::size_t>(panel_bytes(type, width, k)));
    for (std::int64_t j = 0; j < k; ++j) {
      const float* column = weight + first * row_stride + j * column_stride;
      for (std::int64_t c = 0; c < real; ++c) {
        const float value = column[c * row_stride];
        const std::int64_t at = start + place(type, width, c, j);
        if (type == WeightType::fp32)
          static_cast<float*>(packed)[at] = value;
        else if (type == WeightType::bf16)
          static_cast<std::uint16_t*>(packed)[at] = to_bf16(value);
        else
          static_cast<std::int8_t*>(packed)[at] = to_int8(value, scale[first + c]);
      }
    }
  }
}

void unpack_weight(Isa isa, WeightType type, const void* packed, const float* scale, std::int64_t n,
                   std::int64_t k, float* weight) {
  const std::int64_t width = panel_width(isa), panel = width * padded_k(type, k);
  if (type == WeightType::int4) return unpack_int4(static_cast<const char*>(packed), n, k, width, weight);
  for (std::int64_t channel = 0; channel < n; ++channel) {
    const std::int64_t start = channel / width * panel;
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t at = start + place(type, width, channel % width, j);
      float& value = weight[channel * k + j];
      if (type == WeightType::fp32)
        value = static_cast<const float*>(packed)[at];
      else if (type == WeightType::bf16)
        value = from_bf16(static_cast<const std::uint16_t*>(packed)[at]);
      else
        value = static_cast<float>(static_cast<const std::int8_t*>(packed)[at]) * scale[channel];
    }
  }
}

}  // namespace prunekern
