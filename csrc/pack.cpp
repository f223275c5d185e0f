#include <algorithm>

#include "prunekern/prunekern.h"

namespace prunekern {

std::int64_t packed_size(Isa isa, std::int64_t n, std::int64_t k) {
  const std::int64_t width = panel_width(isa);
  return (n + width - 1) / width * width * k;
}

void pack_weight(Isa isa, const float* weight, std::int64_t row_stride, std::int64_t column_stride, std::int64_t n,
                 std::int64_t k, float* packed) {
  const std::int64_t width = panel_width(isa);
  for (std::int64_t channel = 0; channel < n; channel += width, packed += width * k) {
    const std::int64_t real = std::min(width, n - channel);
    for (std::int64_t j = 0; j < k; ++j) {
      const float* column = weight + channel * row_stride + j * column_stride;
      float* out = packed + j * width;
      for (std::int64_t c = 0; c < real; ++c) out[c] = column[c * row_stride];
      std::fill(out + real, out + width, 0.0f);
    }
  }
}

void unpack_weight(Isa isa, const float* packed, std::int64_t n, std::int64_t k, float* weight) {
  const std::int64_t width = panel_width(isa);
  for (std::int64_t channel = 0; channel < n; ++channel) {
    const float* panel = packed + channel / width * width * k + channel % width;
    for (std::int64_t j = 0; j < k; ++j) weight[channel * k + j] = panel[j * width];
  }
}

}  // namespace prunekern
