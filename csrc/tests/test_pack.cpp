// pack and unpack: any strides, padding is zero, nothing is written outside.
#include <algorithm>

#include "check.h"

using namespace prunekern;

int main() {
  const float poison = 1e30f;
  for (Isa isa : supported_isas())
    for (std::int64_t n : {1, 7, 33, 577})
      for (std::int64_t k : {0, 1, 372}) {
        const std::int64_t width = panel_width(isa), size = packed_bytes(isa, WeightType::fp32, n, k) / 4;
        CHECK(size == (n + width - 1) / width * width * k, "%s", name(isa));
        const std::vector<float> weight = random_floats(static_cast<std::size_t>(n * k), 1);
        std::vector<float> transposed(weight.size());
        for (std::int64_t i = 0; i < n; ++i)
          for (std::int64_t j = 0; j < k; ++j) transposed[j * n + i] = weight[i * k + j];
        std::vector<float> packed(size + 64, poison), other(size + 64, poison), back(n * k + 1, poison);
        pack_weight(isa, WeightType::fp32, weight.data(), k, 1, n, k, packed.data(), nullptr);
        pack_weight(isa, WeightType::fp32, transposed.data(), 1, n, n, k, other.data(), nullptr);
        CHECK(packed == other, "the same weight, transposed in memory, must pack the same");
        CHECK(std::all_of(packed.begin() + size, packed.end(), [&](float v) { return v == poison; }),
              "overrun");
        for (std::int64_t channel = 0; channel < (n + width - 1) / width * width; ++channel)
          for (std::int64_t j = 0; j < k; ++j) {
            const float value = packed[channel / width * width * k + j * width + channel % width];
            CHECK(value == (channel < n ? weight[channel * k + j] : 0.0f), "channel %ld input %ld",
                  static_cast<long>(channel), static_cast<long>(j));
          }
        unpack_weight(isa, WeightType::fp32, packed.data(), nullptr, n, k, back.data());
        CHECK(std::equal(weight.begin(), weight.end(), back.begin()) && back.back() == poison, "round trip");
      }
  return 0;
}
