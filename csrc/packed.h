// How packed weights lie in memory; see prunekern/linear.h.
#pragma once

#include "blocks.h"
#include "prunekern/linear.h"

namespace prunekern {

// Inputs a panel has room for: with bf16 whole AMX tiles, which read 32.
inline std::int64_t padded_k(WeightType type, std::int64_t k) {
  return type == WeightType::bf16 ? round_up(k, 32) : k;
}

inline std::int64_t value_bytes(WeightType type) {
  return type == WeightType::fp32 ? 4 : type == WeightType::bf16 ? 2 : 1;
}

inline std::int64_t element_bytes(Element element) { return element == Element::fp32 ? 4 : 2; }

}  // namespace prunekern
