// Which row of the table multiplies, and the sizes that follow from it.
#pragma once

#include <algorithm>

#include "kernels/product.h"
#include "loops/caches.h"
#include "loops/shares.h"

namespace prunekern {

// Whether x may be rounded as a row of the table does it: to int8 only where sums fit int32, as those of a
// group of int4 do.
inline bool may_round(const Product& product, const Packed& weight) {
  if (weight.activations == Activations::floating) return product.arithmetic == Arithmetic::fp32;
  return product.arithmetic != Arithmetic::int8 || weight.type == WeightType::int4 ||
         weight.k <= kMostInt8Inputs;
}

// The row for `m` rows of x: the last that takes them. Null: fp32 arithmetic, which every table has. Where
// int8 is asked for it is used at any number of rows.
inline const Product* product_for(const Kernels& kernels, const Packed& weight, Element element,
                                  std::int64_t m) {
  const Product *found = nullptr, *asked = nullptr;
  for (const Product* one : kernels.products) {
    if (one == nullptr || one->weights != weight.type || !may_round(*one, weight)) continue;
    const bool quantizes = one->arithmetic == Arithmetic::int8;
    if (quantizes && asked == nullptr && weight.activations == Activations::int8) asked = one;
    if (m >= one->least_rows[static_cast<int>(element)] && m <= one->most_rows) found = one;
  }
  return found != nullptr ? found : asked;
}

// Rows of one product. Blocks of rows begin at a whole number of them.
inline std::int64_t group_rows(const Product& product) { return product.row_tiles * product.tile_rows; }

inline std::int64_t steps(const Product& product, std::int64_t k) { return ceil_div(k, product.step_inputs); }
inline std::int64_t row_tile_bytes(const Product& product, std::int64_t k) {
  return steps(product, k) * product.step_bytes + product.tail_bytes;
}
// Of `rows` prepared rows of k inputs.
inline std::int64_t prepared_bytes(const Product& product, std::int64_t rows, std::int64_t k) {
  return ceil_div(rows, product.tile_rows) * row_tile_bytes(product, k);
}

// Rows of `row_bytes` that stay in L2 together with two panels: this one, and the next on its way in. Each
// block streams all weights. On Sapphire Rapids 32 rows of bf16 products hide 2 KB in 64 cycles, and 24 GB/s
// from the last-level cache are about 9 bytes a cycle, so up to 110 rows would wait for weights.
inline std::int64_t block_rows(const Product& product, std::int64_t row_bytes, std::int64_t panel_bytes) {
  const std::int64_t group = group_rows(product);
  const std::int64_t fit = (l2_bytes() * 3 / 4 - 2 * panel_bytes) / std::max<std::int64_t>(row_bytes, 1);
  return fit < 2 * group ? 2 * group : fit / group * group;
}

// The same for a layer of k inputs.
inline std::int64_t block_rows(const Product& product, std::int64_t k) {
  return block_rows(product, row_tile_bytes(product, k) / product.tile_rows,
                    steps(product, k) * product.panel_step_bytes);
}

}  // namespace prunekern
