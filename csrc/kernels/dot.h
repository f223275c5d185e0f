// Products of 8 and 16 bits on vector units, written once for any way D of adding four bytes' worth of
// products to every lane, and instantiated by one file for each instruction set.
//
// The tile is that of tile.h: R rows of x by two vectors of channels, R x 2 sums in registers over the whole
// of k. A step of k is `kGroups` groups of inputs, each one vector of weights for a vector of channels.
//   row tile: [k_steps][kRows][kGroups] groups of kGroupBytes, then what D says of its rows
//
// AVX-512 VNNI, 14 rows: 28 vpdpbusd of a group want 2 vectors of weights and 14 broadcasts, 16 loads; at one
// vpdpbusd (EPYC) or two (Xeon) a cycle the loads never bind. Weights come from L2 at 128 bytes per 28
// cycles.
#pragma once

#include "kernels/drawn.h"
#include "kernels/finish.h"
#include "kernels/tile.h"

namespace prunekern {

template <class D, int R, int C>
void dot_tile(const ProductArgs& args) {
  using Sum = typename D::Sum;
  constexpr int kVector = D::V::kWidth, kVectorBytes = 4 * kVector;
  constexpr int kChains = chains(R * C);  // 1, 2 or 4
  static_assert(D::kGroups % 4 == 0, "groups are taken by four");
  const char* a = args.x;
  const char* panel = args.panel;
  const char* tail = args.x + args.k_steps * D::kGroups * D::kRows * D::kGroupBytes;
  Drawn<D> drawn(args, R);

  Sum acc[kChains][R][C];
#pragma GCC unroll 4
  for (int s = 0; s < kChains; ++s)
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[s][r][c] = s == 0 ? D::start(tail, r) : D::zero();

  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    drawn.step(args);
    for (int four = 0; four < D::kGroups; four += 4) {
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        typename D::Weights weights[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) weights[c] = D::weights(panel + (2 * g + c) * kVectorBytes);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const typename D::X x = D::x(a + (r * D::kGroups + g) * D::kGroupBytes);
#pragma GCC unroll 2
          for (int c = 0; c < C; ++c) acc[g % kChains][r][c] = D::dot(acc[g % kChains][r][c], weights[c], x);
        }
      }
      a += 4 * D::kGroupBytes;
      panel += 4 * 2 * kVectorBytes;
    }
    a += (D::kRows - 1) * D::kGroups * D::kGroupBytes;
  }

#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      Sum sum = D::zero();  // of channels that nobody wants
      if (c < C) {
        sum = acc[0][r][c < C ? c : 0];
#pragma GCC unroll 4
        for (int s = 1; s < kChains; ++s) sum = D::add(sum, acc[s][r][c < C ? c : 0]);
      }
      D::store(args.acc + (2 * r + c) * kVector, sum);
    }
}

// Multiply of a Product: rows that are there, and the finish of what came before.
template <class D, int... R>
void dot_rows(const ProductArgs& args) {
  static constexpr MultiplyFn tiles[] = {nullptr, dot_tile<D, R, 2>...},
                              halves[] = {nullptr, dot_tile<D, R, 1>...};
  run_rows<D>(args.half ? halves : tiles, args);
}

// What the units can do: independent chains and no memory.
template <class D>
std::int64_t dot_peak(std::int64_t steps) {
  constexpr int kChains = 12;
  typename D::Sum acc[kChains];
  alignas(64) char bytes[128] = {1, 2, 3, 4, 5};
  acc[0] = D::zero();
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) {  // no two alike, or the compiler would run one of them
    bytes[0] = static_cast<char>(i);
    acc[i] = D::dot(acc[i - 1], D::weights(bytes), D::x(bytes));
  }
  const typename D::X x = D::x(bytes);
  const typename D::Weights weights = D::weights(bytes);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = D::dot(acc[i], weights, x);
  }
  float sink[D::V::kWidth];
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) acc[0] = D::add(acc[0], acc[i]);
  D::store(sink, acc[0]);
  volatile float used = sink[0];
  (void)used;
  return steps * kChains * D::V::kWidth * D::kGroupInputs * 2;
}

template <class D, class Sums, int... R>
constexpr Product make_dot_product(WeightType weights, Arithmetic arithmetic, std::int64_t least_rows,
                                   std::int64_t most_rows) {
  Product row{};
  row.weights = weights;
  row.arithmetic = arithmetic;
  row.least_rows[0] = row.least_rows[1] = least_rows;
  row.most_rows = most_rows;
  row.tile_rows = D::kRows;
  row.row_tiles = 1;
  row.step_inputs = D::kGroups * D::kGroupInputs;
  row.step_bytes = D::kGroups * D::kRows * D::kGroupBytes;
  row.tail_bytes = D::kTailBytes;
  row.panel_step_bytes = D::kGroups * 2 * 4 * D::V::kWidth;
  row.prepare[0] = D::template prepare<float>;
  row.prepare[1] = D::template prepare<std::uint16_t>;
  row.multiply = dot_rows<D, R...>;
  fill_finishes<typename D::V, Sums, float>(row.finish[0]);
  fill_finishes<typename D::V, Sums, std::uint16_t>(row.finish[1]);
  if constexpr (D::kHasPeak) row.peak = dot_peak<D>;
  return row;
}

}  // namespace prunekern
