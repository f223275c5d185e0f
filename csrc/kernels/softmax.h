// Everything of attention that is not a tile: packing keys and values, softmax, and adding up blocks of keys.
// Written once for any vector type V; the rules of tile.h hold here too.
#pragma once

#include "kernels/attention_kernels.h"

namespace prunekern {

// Rows become columns. One step sends element (r, c) to where the bits of (r, c), written one after the
// other, stand when turned left by one; log2(width) steps swap r and c.
template <class V>
__attribute__((always_inline)) inline void transpose(typename V::F* rows) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth;
#pragma GCC unroll 4
  for (int step = 1; step < kVector; step *= 2) {
    F turned[kVector];
#pragma GCC unroll 8
    for (int i = 0; i < kVector / 2; ++i) {
      turned[2 * i] = V::zip_low(rows[i], rows[i + kVector / 2]);
      turned[2 * i + 1] = V::zip_high(rows[i], rows[i + kVector / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVector; ++i) rows[i] = turned[i];
  }
}

// 8,192 floats (128 keys of 64 channels): 32 blocks of 64 shuffles, 3 % of what their head's products take;
// one float at a time it would be 10 %.
template <class V>
void pack_keys(const PackKeysArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const F scale = V::set(args.scale);
  for (std::int64_t first = 0; first < args.n; first += kVector) {
    float* panel = args.panels + first / kPanel * kPanel * args.d + first % kPanel;
    const std::int64_t keys = args.n - first < kVector ? args.n - first : kVector;
    for (std::int64_t c = 0; c < args.d; c += kVector) {
      const int channels = args.d - c < kVector ? static_cast<int>(args.d - c) : kVector;
      F rows[kVector];
      if (keys == kVector && channels == kVector) {
#pragma GCC unroll 16
        for (int i = 0; i < kVector; ++i)
          rows[i] = V::mul(V::load(args.keys + args.row[first + i] + c), scale);
        transpose<V>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kVector; ++i) V::store(panel + (c + i) * kPanel, rows[i]);
      } else {
        for (int i = 0; i < kVector; ++i)
          rows[i] = i < keys ? V::mul(V::load_part(args.keys + args.row[first + i] + c, channels), scale)
                             : V::set(0.0f);
        transpose<V>(rows);
        for (int i = 0; i < channels; ++i) V::store(panel + (c + i) * kPanel, rows[i]);
      }
    }
  }
}

template <class V>
void pack_values(const PackValuesArgs& args) {
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  for (std::int64_t i = 0; i < args.n; ++i) {
    const float* from = args.values + args.row[i];
    float* to = args.panels + i * kPanel;
    std::int64_t left = args.d;
    for (; left >= kPanel; left -= kPanel, from += kPanel, to += args.n * kPanel) {
      V::store(to, V::load(from));
      V::store(to + kVector, V::load(from + kVector));
    }
    for (; left > 0; left -= kVector, from += kVector, to += kVector)
      V::store(to, left < kVector ? V::load_part(from, static_cast<int>(left)) : V::load(from));
  }
}

// Minimax fit of 2^r on [-1/2, 1/2] in relative error (1.1e-7), exact at 0.
constexpr float kPowerOf2[] = {
    1.0f, 6.931469776e-1f, 2.402224209e-1f, 5.550733743e-2f, 9.671512640e-3f, 1.326472720e-3f};

// 2^x for x <= 0: relative error under 2e-7; below -126 it stays at 2^-126, which a sum of at least 1 does
// not see. Base 2 saves 7 of exp's 18 operations. The clamp puts x second: NaN goes through.
template <class V>
__attribute__((always_inline)) inline typename V::F power_of_2(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-126.0f), x);
  const F n = V::round(x);
  const F r = V::sub(x, n);
  F p = V::set(kPowerOf2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = V::fma(p, r, V::set(kPowerOf2[i]));
  return V::scale(p, n);
}

// Of every row, the largest lane (or the sum), row r in lane r: `transpose` with half of every step joined
// away, 30 shuffles for 16 rows instead of 16 times 4.
template <class V, class Join>
__attribute__((always_inline)) inline typename V::F join_lanes(const float* lanes, std::int64_t rows,
                                                               Join join) {
  typename V::F all[V::kWidth];
#pragma GCC unroll 16
  for (int r = 0; r < V::kWidth; ++r) all[r] = r < rows ? V::load(lanes + r * V::kWidth) : V::set(0.0f);
#pragma GCC unroll 4
  for (int half = V::kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      all[i] = join(V::zip_low(all[i], all[i + half]), V::zip_high(all[i], all[i + half]));
  }
  return all[0];
}

// First the largest scores of all rows, then all powers: within a row each waits for the other.
template <class V>
void softmax(const SoftmaxArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  const std::int64_t panels = (args.n + kPanel - 1) / kPanel, step = args.rows * kPanel;
  const F present[2] = {V::load(args.present), V::load(args.present + kVector)};
  const F nothing =
      V::set(-__builtin_inff());  // in place of what a missing key gives: 0, or NaN where q is infinite
  alignas(64) float lanes[kVector * kVector];
  for (std::int64_t r = 0; r < args.rows; ++r) {
    const float* row = args.scores + r * kPanel;
    F low = V::select_positive(present[0], V::load(row + (panels - 1) * step), nothing);
    F high = V::select_positive(present[1], V::load(row + (panels - 1) * step + kVector), nothing);
    for (std::int64_t p = 0; p + 1 < panels; ++p) {
      low = V::max(low, V::load(row + p * step));
      high = V::max(high, V::load(row + p * step + kVector));
    }
    V::store(lanes + r * kVector, V::max(low, high));
  }
  const F old_max = V::load(args.max);
  const F max = V::max(old_max, join_lanes<V>(lanes, args.rows, [](F a, F b) { return V::max(a, b); }));
  const F decay = power_of_2<V>(V::sub(old_max, max));
  V::store(args.max, max);
  V::store(args.decay, decay);

  for (std::int64_t r = 0; r < args.rows; ++r) {
    const float* row = args.scores + r * kPanel;
    float* out = args.p + r * args.p_stride;
    const F shift = V::set(args.max[r]);
    F low = V::set(0.0f), high = low;
    for (std::int64_t p = 0; p < panels; ++p) {
      F a = V::load(row + p * step), b = V::load(row + p * step + kVector);
      if (p + 1 == panels) {
        a = V::select_positive(present[0], a, nothing);
        b = V::select_positive(present[1], b, nothing);
      }
      a = power_of_2<V>(V::sub(a, shift));
      b = power_of_2<V>(V::sub(b, shift));
      if (p + 1 == panels) {  // not 2^-126: where all scores are -inf, as much as a key that is there
        a = V::select_positive(present[0], a, V::set(0.0f));
        b = V::select_positive(present[1], b, V::set(0.0f));
      }
      low = V::add(low, a);
      high = V::add(high, b);
      V::store(out + p * kPanel, a);
      V::store(out + p * kPanel + kVector, b);
    }
    V::store(lanes + r * kVector, V::add(low, high));
  }
  V::store(args.sum, V::fma(V::load(args.sum), decay,
                            join_lanes<V>(lanes, args.rows, [](F a, F b) { return V::add(a, b); })));
}

template <class V>
void combine(const CombineArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  for (std::int64_t r = 0; r < args.rows; ++r) {
    const float* acc = args.acc + r * kPanel;
    float* y = args.y + r * args.y_stride;
    const F after = V::set(args.after[r]);
    for (std::int64_t c = 0; c < args.columns; c += kVector) {
      F sum = V::load(acc + c);
      const int columns = args.columns - c < kVector ? static_cast<int>(args.columns - c) : kVector;
      if (args.before != nullptr) sum = V::fma(V::load_part(y + c, columns), V::set(args.before[r]), sum);
      sum = V::mul(sum, after);
      if (columns == kVector)
        V::store(y + c, sum);
      else
        V::store_part(y + c, sum, columns);
    }
  }
}

template <class V>
void add_positions(const AddPositionsArgs& args) {
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kPanel = 2 * kVector;
  for (std::int64_t first = 0; first < args.n; first += kPanel)
    for (std::int64_t r = 0; r < args.rows; ++r) {
      const std::int64_t at = first * args.rows + r * kPanel;
      for (int c = 0; c < kPanel && first + c < args.n; c += kVector) {
        F sum = V::load(args.scores + at + c);
        if (args.by_key != nullptr) sum = V::add(sum, V::load(args.by_key + at + c));
        if (args.by_query != nullptr)
          sum = V::add(sum, V::load(args.by_query + r * args.by_query_stride + first + c));
        V::store(args.scores + at + c, sum);
      }
    }
}

}  // namespace prunekern
