#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "huge_pages.h"
#include "prunekern/linear.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace prunekern {

void prefer_huge_pages(void* data, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHugePage = 2 << 20;
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

namespace {

std::int64_t padded_k(WeightType type, std::int64_t k) {
  return type == WeightType::bf16 ? (k + 31) / 32 * 32 : k;  // one tile of AMX reads 32
}

std::int64_t value_bytes(WeightType type) {
  return type == WeightType::fp32 ? 4 : type == WeightType::bf16 ? 2 : 1;
}

// Where weight (channel c of its panel, input j) stands in the panel.
std::int64_t place(WeightType type, std::int64_t width, std::int64_t c, std::int64_t j) {
  return type == WeightType::bf16 ? (j / 2 * width + c) * 2 + j % 2 : j * width + c;
}

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000)
    return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // NaN stays one
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

}  // namespace

std::int64_t packed_bytes(Isa isa, WeightType type, std::int64_t n, std::int64_t k) {
  const std::int64_t width = panel_width(isa);
  return (n + width - 1) / width * width * padded_k(type, k) * value_bytes(type);
}

void pack_weight(Isa isa, WeightType type, const float* weight, std::int64_t row_stride,
                 std::int64_t column_stride, std::int64_t n, std::int64_t k, void* packed, float* scale) {
  const std::int64_t width = panel_width(isa), panel = width * padded_k(type, k);
  prefer_huge_pages(packed, packed_bytes(isa, type, n, k));
  for (std::int64_t first = 0; first < n; first += width) {
    const std::int64_t real = std::min(width, n - first), start = first / width * panel;
    float inverse[64] = {};
    if (type == WeightType::int8) {
      for (std::int64_t c = 0; c < real; ++c) {
        float largest = 0.0f;
        for (std::int64_t j = 0; j < k; ++j)
          largest = std::max(largest, std::fabs(weight[(first + c) * row_stride + j * column_stride]));
        scale[first + c] = largest / 127.0f;
        inverse[c] = largest > 0.0f ? 127.0f / largest : 0.0f;
      }
    }
    if (real < width || padded_k(type, k) != k)
      std::memset(static_cast<char*>(packed) + start * value_bytes(type), 0,
                  static_cast<std::size_t>(panel * value_bytes(type)));
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
          static_cast<std::int8_t*>(packed)[at] = static_cast<std::int8_t>(std::lrint(value * inverse[c]));
      }
    }
  }
}

void unpack_weight(Isa isa, WeightType type, const void* packed, const float* scale, std::int64_t n,
                   std::int64_t k, float* weight) {
  const std::int64_t width = panel_width(isa), panel = width * padded_k(type, k);
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
