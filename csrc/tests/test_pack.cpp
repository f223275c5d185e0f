// pack and unpack: any strides, every type, padding is zero, nothing is written outside; what NaN, infinite
// and subnormal weights become.
#include <algorithm>

#include "ops/half.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr char kPoison = 0x5a;

// The value of (channel, input) as the layout in prunekern/linear.h puts it.
float value_at(WeightType type, const char* packed, std::int64_t width, std::int64_t k, std::int64_t channel,
               std::int64_t j) {
  const std::int64_t panel = channel / width, c = channel % width;
  if (type == WeightType::fp32) {
    float value;
    std::memcpy(&value, packed + ((panel * k + j) * width + c) * 4, 4);
    return value;
  }
  if (type == WeightType::int4) {
    const std::int64_t groups = (k + 31) / 32, i = j % 32;
    const char* group = packed + (panel * groups + j / 32) * 18 * width;
    const unsigned char both = group[(i % 16 / 4 * width + c) * 4 + i % 4];
    std::uint16_t scale;
    std::memcpy(&scale, group + 16 * width + 2 * c, 2);
    return ((i < 16 ? both % 16 : both / 16) - 8) * from_half(scale);
  }
  if (type == WeightType::int8) {
    const std::int64_t fours = (k + 15) / 16 * 4;
    return static_cast<signed char>(packed[((panel * fours + j / 4) * width + c) * 4 + j % 4]);
  }
  const std::int64_t pairs = (k + 31) / 32 * 16;
  std::uint16_t half;
  std::memcpy(&half, packed + (((panel * pairs + j / 2) * width + c) * 2 + j % 2) * 2, 2);
  return float_of(half);
}

// What is stored for `weight`, and the step of int8.
float expected(WeightType type, float weight, float largest) {
  if (type == WeightType::fp32) return weight;
  if (type == WeightType::bf16) return float_of(bf16_of(weight));
  return largest > 0 ? static_cast<float>(std::nearbyint(weight / (largest / 127.0f))) : 0.0f;
}

void check(Isa isa, WeightType type, std::int64_t n, std::int64_t k) {
  const std::int64_t width = panel_width(isa), panels = (n + width - 1) / width;
  const std::int64_t rows = type == WeightType::bf16 || type == WeightType::int4 ? (k + 31) / 32 * 32
                            : type == WeightType::int8                           ? (k + 15) / 16 * 16
                                                                                 : k;
  const std::int64_t bytes = type == WeightType::fp32 ? 4 : type == WeightType::bf16 ? 2 : 1;
  const std::int64_t size = packed_bytes(isa, type, n, k);
  CHECK(size == (type == WeightType::int4 ? panels * rows * width / 32 * 18 : panels * rows * width * bytes),
        "%s %s", name(isa), name(type));
  const std::vector<float> weight = random_floats(static_cast<std::size_t>(n * k), 1);
  std::vector<float> transposed(weight.size());
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < k; ++j) transposed[j * n + i] = weight[i * k + j];
  std::vector<char> packed(size + 64, kPoison), other(size + 64, kPoison);
  std::vector<float> scale(n + 1, 1e30f), back(n * k + 1, 1e30f);
  pack_weight(isa, type, weight.data(), k, 1, n, k, packed.data(), scale.data());
  pack_weight(isa, type, transposed.data(), 1, n, n, k, other.data(), scale.data());
  CHECK(packed == other, "the same weight, transposed in memory, must pack the same");
  CHECK(std::all_of(packed.begin() + size, packed.end(), [](char v) { return v == kPoison; }), "overrun");
  CHECK(scale[n] == 1e30f && (type == WeightType::int8 || scale[0] == 1e30f),
        "scale is written for int8 only");
  unpack_weight(isa, type, packed.data(), scale.data(), n, k, back.data());
  for (std::int64_t channel = 0; channel < panels * width; ++channel) {
    float largest = 0.0f;
    for (std::int64_t j = 0; j < k && channel < n; ++j)
      largest = std::fmax(largest, std::fabs(weight[channel * k + j]));
    if (type == WeightType::int8 && channel < n)
      CHECK(scale[channel] == largest / 127.0f, "channel %ld: scale %g", long(channel), scale[channel]);
    for (std::int64_t j = 0; j < rows; ++j) {
      const bool real = channel < n && j < k;
      const float got = value_at(type, packed.data(), width, k, channel, j);
      if (type ==
          WeightType::int4) {  // what it becomes is for test_int4: here that it stands where it should
        CHECK(real
                  ? std::fabs(got - weight[channel * k + j]) <= 0.2f * largest && got == back[channel * k + j]
                  : got == 0.0f,
              "int4 channel %ld input %ld: %g", long(channel), long(j), got);
        continue;
      }
      const float want = real ? expected(type, weight[channel * k + j], largest) : 0.0f;
      CHECK(got == want, "%s %s channel %ld input %ld: %g, want %g", name(isa), name(type), long(channel),
            long(j), got, want);
      const float step = type == WeightType::int8 && real ? scale[channel] : 1.0f;
      if (real) CHECK(back[channel * k + j] == want * step, "unpacked %g", back[channel * k + j]);
    }
  }
  CHECK(back.back() == 1e30f, "overrun of the unpacked");
}

// Four channels of three inputs: an infinity, a NaN, zeros, and the largest numbers; then subnormal ones.
void check_extremes(Isa isa) {
  const float infinity = std::numeric_limits<float>::infinity(),
              nan = std::numeric_limits<float>::quiet_NaN(), most = 3e38f,
              least = std::numeric_limits<float>::denorm_min();
  const std::vector<float> weight = {1,        -infinity, 2, nan,   1,      1, 0,           -0.0f,        0,
                                     most,     -most,     1, least, -least, 0, 190 * least, -100 * least, 0,
                                     127e-38f, -64e-38f,  0};
  const std::int64_t n = 7, k = 3;
  std::vector<float> scale(n), back(n * k);
  for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8}) {
    std::vector<char> packed(packed_bytes(isa, type, n, k));
    pack_weight(isa, type, weight.data(), k, 1, n, k, packed.data(), scale.data());
    unpack_weight(isa, type, packed.data(), scale.data(), n, k, back.data());
    if (type == WeightType::int8) {
      for (int i = 0; i < 6; ++i) CHECK(std::isnan(back[i]), "a channel with inf or NaN: %g", back[i]);
      for (int i = 6; i < 9; ++i) CHECK(back[i] == 0.0f && scale[2] == 0.0f, "zeros: %g", back[i]);
      for (int i = 9; i < 11; ++i) CHECK(std::fabs(back[i] / weight[i] - 1) < 1e-6, "%g", back[i]);
      for (int i = 12; i < 15; ++i)
        CHECK(back[i] == 0.0f && scale[4] == 0.0f, "too small for a step: %g", back[i]);
      for (int i = 15; i < 18; ++i)
        CHECK(std::fabs(back[i] - weight[i]) <= 63 * least, "subnormal step: %g", back[i]);
      for (int i = 18; i < 21; ++i) CHECK(std::fabs(back[i] - weight[i]) <= 1e-43f, "%g", back[i]);
    } else {
      CHECK(back[1] == -infinity && std::isnan(back[3]), "%s: %g %g", name(type), back[1], back[3]);
      CHECK(back[9] == (type == WeightType::fp32 ? most : float_of(bf16_of(most))), "%s: %g", name(type),
            back[9]);
    }
  }
}

}  // namespace

int main() {
  for (Isa isa : supported_isas()) {
    for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8, WeightType::int4})
      for (std::int64_t n : {1, 7, 33, 577})
        for (std::int64_t k : {0, 1, 372}) check(isa, type, n, k);
    check_extremes(isa);
  }
  return 0;
}
