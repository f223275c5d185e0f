// One query in up to four heads that share its keys: each key and value is read once, where it lies. Packing
// them first, as tiles want it, takes longer than the products: 192 keys of 64 channels in 3 heads are 147
// kflop, 1 us, and 98 KB in and as much out again. On an EPYC, caches from memory: 3 such heads take 0.77 to
// 0.79 of the time of tiles, 8 of 4 heads on 2,048 keys of 128 channels 0.84 to 0.89. With 8 heads for a key
// both are equal, and 32 would take 1.4 x what tiles do.
#pragma once

#include "kernels/softmax.h"

namespace prunekern {

constexpr std::int64_t kKeysAhead = 24;  // rows drawn into L1; without, 1.1 to 1.4 x the time

__attribute__((always_inline)) inline void draw_row(const float* row, std::int64_t floats) {
  for (std::int64_t c = 0; c < floats; c += 16) __builtin_prefetch(row + c, 0, 3);
}

// Row i of n, or what comes after them.
__attribute__((always_inline)) inline void draw_ahead(const float* data, const std::int64_t* row,
                                                      std::int64_t i, std::int64_t n, std::int64_t floats,
                                                      const NextRows& next) {
  if (i < n)
    draw_row(data + row[i], floats);
  else if (i - n < next.n)
    draw_row(next.data + next.row[i - n], next.d);
}

// Keys a vector at a time: partial sums of each, then all their lanes at once.
template <class V, int R>
void score_rows(const ScoreArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const std::int64_t whole = args.d / kVector * kVector;
  const int rest = static_cast<int>(args.d - whole);
  const float* q = args.q;
  const F scale = V::set(args.scale);
  alignas(64) float lanes[R][kVector * kVector];
  for (std::int64_t first = 0; first < args.n; first += kVector) {
    const std::int64_t keys = args.n - first < kVector ? args.n - first : kVector;
    for (std::int64_t i = 0; i < keys; ++i) {
      const float* key = args.keys + args.row[first + i];
      draw_ahead(args.keys, args.row, first + i + kKeysAhead, args.n, args.d, args.next);
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
    float* to = args.scores + first / kPanel * R * kPanel + first % kPanel;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      V::store(to + r * kPanel,
               V::mul(join_lanes<V>(lanes[r], keys, [](F a, F b) { return V::add(a, b); }), scale));
  }
}

template <class V>
void score(const ScoreArgs& args) {
  constexpr void (*kRows[kMaxLoneRows])(const ScoreArgs&) = {score_rows<V, 1>, score_rows<V, 2>,
                                                             score_rows<V, 3>, score_rows<V, 4>};
  kRows[args.rows - 1](args);
}

// R queries, C vectors of channels from `column` on: as many sums as registers hold.
template <class V, int R, int C>
void weigh_part(const WeighArgs& args, std::int64_t column) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const std::int64_t channels = args.d - column < C * kVector ? args.d - column : C * kVector;
  const int last = static_cast<int>(channels - (C - 1) * kVector);  // of the last vector
  F sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = V::set(0.0f);
  for (std::int64_t i = 0; i < args.n; ++i) {
    const float* value = args.values + args.row[i] + column;
    draw_ahead(args.values + column, args.row, i + kKeysAhead, args.n, channels, args.next);
    F x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      x[c] = c + 1 < C ? V::load(value + c * kVector) : V::load_part(value + c * kVector, last);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F weight = V::set(args.p[r * args.p_stride + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = V::madd(weight, x[c], sum[r][c]);
    }
  }
  float* to = args.acc + column * R;  // whole panels
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) V::store(to + (c / 2 * R + r) * kPanel + c % 2 * kVector, sum[r][c]);
}

template <class V, int R>
void weigh_rows(const WeighArgs& args) {
  constexpr int kMost = V::kWidth == 16 ? 4 : 2;  // times 4 rows: half of the registers
  for (std::int64_t column = 0; column < args.d; column += kMost * V::kWidth) {
    const std::int64_t vectors = (args.d - column + V::kWidth - 1) / V::kWidth;
    if (vectors >= kMost)
      weigh_part<V, R, kMost>(args, column);
    else if (vectors == 1)
      weigh_part<V, R, 1>(args, column);
    else if (vectors == 2)
      weigh_part<V, R, 2>(args, column);
    else
      weigh_part<V, R, kMost - 1>(args, column);
  }
}

template <class V>
void weigh(const WeighArgs& args) {
  constexpr void (*kRows[kMaxLoneRows])(const WeighArgs&) = {weigh_rows<V, 1>, weigh_rows<V, 2>,
                                                             weigh_rows<V, 3>, weigh_rows<V, 4>};
  kRows[args.rows - 1](args);
}

}  // namespace prunekern
