// One query in all heads that share its keys: every key and value is read once, where it lies. Packing them
// first, as tiles want it, takes longer than the products: 192 keys of 64 channels in 3 heads are 74 kflop a
// head, under 1 us, and 98 KB in and as much out again.
#pragma once

#include "softmax.h"

namespace prunekern {

constexpr std::int64_t kKeysAhead = 24;  // rows drawn into L1: they lie pages apart in a large cache

__attribute__((always_inline)) inline void draw_row(const float* row, std::int64_t floats) {
  for (std::int64_t c = 0; c < floats; c += 16) __builtin_prefetch(row + c, 0, 3);
}

// Keys a vector at a time: partial sums of each, then all their lanes at once.
template <class V, int R>
void score_rows(const ScoreArgs& args, std::int64_t row) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const std::int64_t whole = args.d / kVector * kVector;
  const int rest = static_cast<int>(args.d - whole);
  const float* q = args.q + row * args.q_stride;
  const F scale = V::set(args.scale);
  alignas(64) float lanes[R][kVector * kVector];
  for (std::int64_t first = 0; first < args.n; first += kVector) {
    const std::int64_t keys = args.n - first < kVector ? args.n - first : kVector;
    for (std::int64_t i = 0; i < keys; ++i) {
      const float* key = args.keys + args.row[first + i];
      if (first + i + kKeysAhead < args.n) draw_row(args.keys + args.row[first + i + kKeysAhead], args.d);
      F sum[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = V::set(0.0f);
      for (std::int64_t c = 0; c < whole; c += kVector) {
        const F k = V::load(key + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r] = V::madd(k, V::load(q + r * args.q_stride + c), sum[r]);
      }
      if (rest != 0) {
        const F k = V::load_part(key + whole, rest);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r] = V::madd(k, V::load_part(q + r * args.q_stride + whole, rest), sum[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) V::store(lanes[r] + i * kVector, sum[r]);
    }
    float* to = args.scores + (first / kPanel * args.rows + row) * kPanel + first % kPanel;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      V::store(to + r * kPanel,
               V::mul(join_lanes<V>(lanes[r], keys, [](F a, F b) { return V::add(a, b); }), scale));
  }
}

template <class V>
void score(const ScoreArgs& args) {
  constexpr void (*kRows[])(const ScoreArgs&, std::int64_t) = {nullptr, score_rows<V, 1>, score_rows<V, 2>,
                                                               score_rows<V, 3>, score_rows<V, 4>};
  for (std::int64_t row = 0; row < args.rows; row += 4)
    kRows[args.rows - row < 4 ? args.rows - row : 4](args, row);
}

// R queries, C vectors of channels from `column` on: as many sums as registers hold.
template <class V, int R, int C>
void weigh_part(const WeighArgs& args, std::int64_t row, std::int64_t column) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const std::int64_t left = args.d - column;
  const int last = static_cast<int>(left < C * kVector ? left - (C - 1) * kVector : kVector);
  const float* p = args.p + row * args.p_stride;
  F sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = V::set(0.0f);
  for (std::int64_t i = 0; i < args.n; ++i) {
    const float* value = args.values + args.row[i] + column;
    if (i + kKeysAhead < args.n) draw_row(args.values + args.row[i + kKeysAhead] + column, C * kVector);
    F x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      x[c] = c + 1 < C ? V::load(value + c * kVector) : V::load_part(value + c * kVector, last);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F weight = V::set(p[r * args.p_stride + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = V::madd(weight, x[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const std::int64_t at = column + c * kVector;
      V::store(args.acc + (at / kPanel * args.rows + row + r) * kPanel + at % kPanel, sum[r][c]);
    }
}

template <class V>
void weigh(const WeighArgs& args) {
  using Part = void (*)(const WeighArgs&, std::int64_t, std::int64_t);
  constexpr int kMost = V::kWidth == 16 ? 4 : 2;  // 4 rows of them: half of the registers
  constexpr Part kParts[4][4] = {
      {weigh_part<V, 1, 1>, weigh_part<V, 1, 2>, weigh_part<V, 1, kMost - 1>, weigh_part<V, 1, kMost>},
      {weigh_part<V, 2, 1>, weigh_part<V, 2, 2>, weigh_part<V, 2, kMost - 1>, weigh_part<V, 2, kMost>},
      {weigh_part<V, 3, 1>, weigh_part<V, 3, 2>, weigh_part<V, 3, kMost - 1>, weigh_part<V, 3, kMost>},
      {weigh_part<V, 4, 1>, weigh_part<V, 4, 2>, weigh_part<V, 4, kMost - 1>, weigh_part<V, 4, kMost>}};
  for (std::int64_t row = 0; row < args.rows; row += 4) {
    const std::int64_t rows = args.rows - row < 4 ? args.rows - row : 4;
    for (std::int64_t column = 0; column < args.d; column += kMost * V::kWidth) {
      const std::int64_t vectors = (args.d - column + V::kWidth - 1) / V::kWidth;
      kParts[rows - 1][(vectors < kMost ? vectors : kMost) - 1](args, row, column);
    }
  }
}

}  // namespace prunekern
