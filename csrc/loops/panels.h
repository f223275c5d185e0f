// How packed weights lie in memory: panels of w channels, input by input; see prunekern/linear.h.
#pragma once

#include "loops/shares.h"
#include "prunekern/linear.h"

namespace prunekern {

// A panel of one kind of weights.
struct Layout {
  int bits;          // of a weight
  int side_by_side;  // consecutive inputs of a channel that are neighbours
  int multiple;      // a panel has room for a multiple of so many inputs
  bool is_scaled;    // every channel has a scale
};

// By WeightType. Products of 16 bits take inputs two by two, those of 8 bits four by four, and read 32 and 16
// of them at every step.
constexpr Layout kLayouts[] = {{32, 1, 1, false}, {16, 2, 32, false}, {8, 4, 16, true}};
constexpr const Layout& layout(WeightType type) { return kLayouts[static_cast<int>(type)]; }

// Inputs a panel has room for.
inline std::int64_t padded_k(WeightType type, std::int64_t k) { return round_up(k, layout(type).multiple); }

// Bytes of one input of a panel, and of a panel.
inline std::int64_t input_bytes(WeightType type, std::int64_t width) { return width * layout(type).bits / 8; }
inline std::int64_t panel_bytes(WeightType type, std::int64_t width, std::int64_t k) {
  return padded_k(type, k) * input_bytes(type, width);
}

inline std::int64_t element_bytes(Element element) { return element == Element::fp32 ? 4 : 2; }

}  // namespace prunekern
