// How packed weights lie in memory: panels of w channels, input by input; see prunekern/linear.h.
#pragma once

#include "loops/shares.h"
#include "prunekern/linear.h"

namespace prunekern {

// A panel of one kind of weights.
struct Layout {
  int side_by_side;  // consecutive inputs of a channel that are neighbours
  int multiple;      // a panel has room for a multiple of so many inputs
  int bytes;         // of so many inputs of a channel
  bool is_scaled;    // every channel has a scale
};

// By WeightType. Products of 16 bits take inputs two by two, those of 8 bits four by four, and read 32 and 16
// of them at every step. A group of int4 has its scale with it.
constexpr Layout kLayouts[] = {{1, 1, 4, false}, {2, 32, 64, false}, {4, 16, 16, true}, {32, 32, 18, false}};
constexpr const Layout& layout(WeightType type) { return kLayouts[static_cast<int>(type)]; }

// Inputs a panel has room for.
inline std::int64_t padded_k(WeightType type, std::int64_t k) { return round_up(k, layout(type).multiple); }

// Bytes of k inputs of a panel, k a multiple of what lies side by side; and of a panel.
inline std::int64_t inputs_bytes(WeightType type, std::int64_t width, std::int64_t k) {
  return k * width * layout(type).bytes / layout(type).multiple;
}
inline std::int64_t panel_bytes(WeightType type, std::int64_t width, std::int64_t k) {
  return inputs_bytes(type, width, padded_k(type, k));
}

inline std::int64_t element_bytes(Element element) { return element == Element::fp32 ? 4 : 2; }

}  // namespace prunekern
