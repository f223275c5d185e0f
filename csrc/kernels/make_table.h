// The table of one instruction set, from its vector type V and the row counts of its tiles.
#pragma once

#include "kernels/convert.h"
#include "kernels/epilogue.h"
#include "kernels/layer_norm.h"
#include "kernels/lone_query.h"
#include "kernels/softmax.h"
#include "kernels/speed.h"
#include "kernels/stream.h"
#include "kernels/tile.h"

namespace prunekern {

template <class V, class T>
constexpr void fill_epilogues(EpilogueFn (&table)[kActivations]) {
  table[0] = epilogue<V, T, Activation::none>;
  table[1] = epilogue<V, T, Activation::relu>;
  table[2] = epilogue<V, T, Activation::gelu>;
  table[3] = epilogue<V, T, Activation::gelu_tanh>;
  table[4] = epilogue<V, T, Activation::silu>;
  table[5] = epilogue<V, T, Activation::quick_gelu>;
}

template <class V, int... R>
constexpr Kernels make_kernels() {
  Kernels kernels{};
  kernels.width = 2 * V::kWidth;
  kernels.vector = V::kWidth;
  kernels.rows = sizeof...(R);
  const TileFn half[] = {nullptr, tile<V, R, 1>...}, full[] = {nullptr, tile<V, R, 2>...};
  for (int r = 1; r <= kernels.rows; ++r) {
    kernels.half_tile[r] = half[r];
    kernels.tile[r] = full[r];
  }
  kernels.stream_rows = kernels.rows < kMaxStreamRows ? kernels.rows : kMaxStreamRows;
  const StreamFn bf16[] = {nullptr, stream < V, R <= kMaxStreamRows ? R : 1, Bf16Weights < V >> ...};
  const StreamFn int8[] = {nullptr, stream < V, R <= kMaxStreamRows ? R : 1, Int8Weights < V >> ...};
  for (int r = 1; r <= kernels.stream_rows; ++r) {
    kernels.stream[1][r] = bf16[r];
    kernels.stream[2][r] = int8[r];
  }
  kernels.widen[1] = widen_bf16<V>;
  kernels.widen[2] = widen_int8<V>;
  kernels.widen[3] = widen_int4<V>;
  kernels.take[0] = take<V, float>;
  kernels.take[1] = take<V, std::uint16_t>;
  fill_epilogues<V, float>(kernels.epilogue[0]);
  fill_epilogues<V, std::uint16_t>(kernels.epilogue[1]);
  kernels.layer_norm = layer_norm<V>;
  kernels.peak = peak<V>;
  kernels.read = read<V>;
  static_assert(sizeof...(R) <= V::kWidth, "softmax keeps one lane for each row");
  kernels.attention = {pack_keys<V>, pack_values<V>, softmax<V>,      combine<V>,
                       score<V>,     weigh<V>,       add_positions<V>};
  return kernels;
}

}  // namespace prunekern
