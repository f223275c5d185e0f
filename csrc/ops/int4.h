// Groups of int4 weights: 32 consecutive inputs of a channel, one scale in fp16.
#pragma once

#include <cstdint>

namespace prunekern {

constexpr std::int64_t kInt4Group = 32;

// weight: `count` of the group's inputs, `stride` apart; the others are zero. codes: q + 8. Returns the
// scale.
std::uint16_t to_int4(const float* weight, std::int64_t stride, std::int64_t count,
                      std::uint8_t (&codes)[kInt4Group]);

// All of pack_weight and unpack_weight for int4, of panels `width` channels wide.
void pack_int4(const float* weight, std::int64_t row_stride, std::int64_t column_stride, std::int64_t n,
               std::int64_t k, std::int64_t width, char* packed);
void unpack_int4(const char* packed, std::int64_t n, std::int64_t k, std::int64_t width, float* weight);

}  // namespace prunekern
