// Products of int4 weights and int8 rows, written once for any way D of adding four bytes' worth of products
// to every lane.
//
// A step of k is a group of 32 inputs, whose products are summed in integers and then added to fp32 sums,
// times the scale of the group. Weights are stored as code = q + 8, which is unsigned as the instructions
// want it; the sums are too large by 8 times the sum of the row in the group, so they begin with minus that.
// Many rows could take int8 panels, widened a panel at a time: they would gain 8 to 11 % at most, what int8
// is faster at 16 rows and more (EPYC: 365 to 384 G operations/s here, 400 to 425 there).
//   row tile: [k_steps]([8 fours][kRows][4] int8, [kRows] int32 starts), then RowTail
//   panel:    [k_steps]([4][w][4] codes, [w] fp16 scales): the lower halves of the bytes are fours 0 to 3 of
//             the group, the upper halves 4 to 7
#pragma once

#include "kernels/drawn.h"
#include "kernels/finish.h"
#include "kernels/quantize.h"

namespace prunekern {

template <class D, int R>
void int4_tile(const ProductArgs& args) {
  using V = typename D::V;
  using F = typename V::F;
  constexpr int kVector = V::kWidth, kVectorBytes = 4 * kVector, kFourBytes = 4 * D::kRows;
  const char* a = args.x;
  const char* panel = args.panel;
  Drawn<D> drawn(args, R);

  F acc[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) acc[r][c] = V::set(0.0f);

  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    drawn.step(args);
    const char* starts = a + 8 * kFourBytes;
    typename D::Sum sums[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) sums[r][c] = D::start(starts + 4 * r);
    auto four = [&](int i, const typename D::Bytes(&weights)[2]) __attribute__((always_inline)) {
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) {
        const typename D::Bytes x = D::x(a + i * kFourBytes + 4 * r);
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) sums[r][c] = D::dot(sums[r][c], weights[c], x);
      }
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const typename D::Bytes codes[2] = {D::load(panel + 2 * i * kVectorBytes),
                                          D::load(panel + (2 * i + 1) * kVectorBytes)};
      four(i, {D::low(codes[0]), D::low(codes[1])});
      four(i + 4, {D::high(codes[0]), D::high(codes[1])});
    }
    panel += 8 * kVectorBytes;
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const F scale = V::load_half(panel + 2 * c * kVector);
#pragma GCC unroll 14
      for (int r = 0; r < R; ++r) acc[r][c] = V::madd(D::total(sums[r][c], starts + 4 * r), scale, acc[r][c]);
    }
    panel += kVectorBytes;
    a += D::kStepBytes;
  }

#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) V::store(args.acc + (2 * r + c) * kVector, acc[r][c]);
}

template <class D, int... R>
void int4_rows(const ProductArgs& args) {
  static constexpr MultiplyFn tiles[] = {nullptr, int4_tile<D, R>...};
  run_rows<D>(tiles, args);
}

// D::put lays one vector of q out at `to`, and returns its sum.
template <class D, class T>
void prepare_int4(const PrepareArgs& args) {
  using V = typename D::V;
  using F = typename V::F;
  constexpr std::int64_t kRows = D::kRows, kVector = V::kWidth, kVectorOfFours = kVector * kRows;
  const std::int64_t steps = (args.k + 31) / 32, tile_bytes = steps * D::kStepBytes + D::kTailBytes;
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    char* tile = args.to + row / kRows * tile_bytes;
    const std::int64_t r = row % kRows, whole = args.k / kVector * kVector;
    const F rest = V::load_part(x + whole, static_cast<int>(args.k - whole));
    const Rounding<V> rounding = rounding_of<V>(x, args.k);
    const auto rounded = [&](F value) __attribute__((always_inline)) {
      return rounding.is_some ? V::round(V::mul(value, rounding.inverse)) : V::set(0.0f);
    };
    reinterpret_cast<RowTail<D::kRows>*>(tile + steps * D::kStepBytes)->scale[r] = rounding.scale;
    for (std::int64_t k = 0; k < 32 * steps; tile += D::kStepBytes) {
      char* to = tile + 4 * r;
      std::int32_t sum = 0;
      for (const std::int64_t end = k + 32; k < end; k += kVector, to += kVectorOfFours) {
        const F q = k < whole ? rounded(V::load(x + k)) : k == whole ? rounded(rest) : V::set(0.0f);
        sum += D::put(to, q);
      }
      sum *= -8;
      __builtin_memcpy(tile + 8 * 4 * kRows + 4 * r, &sum, 4);
    }
  }
}

// D: the struct derived from this.
template <int rows>
struct Int4Groups {
  static constexpr int kRows = rows, kStepBytes = 36 * rows, kTailBytes = sizeof(RowTail<rows>);

  static int four_bytes(const char* p) {
    int value;
    __builtin_memcpy(&value, p, 4);
    return value;
  }
  static void put_four(char* to, int value) { __builtin_memcpy(to, &value, 4); }
};

template <class D, int... R>
constexpr Product make_int4_product(std::int64_t least_rows, std::int64_t most_rows) {
  Product row{};
  row.weights = WeightType::int4;
  row.arithmetic = Arithmetic::int8;
  row.least_rows[0] = row.least_rows[1] = least_rows;
  row.most_rows = most_rows;
  row.tile_rows = D::kRows;
  row.row_tiles = 1;
  row.step_inputs = 32;
  row.step_bytes = D::kStepBytes;
  row.tail_bytes = D::kTailBytes;
  row.panel_step_bytes = 18 * 2 * D::V::kWidth;
  row.prepare[0] = prepare_int4<D, float>;
  row.prepare[1] = prepare_int4<D, std::uint16_t>;
  row.multiply = int4_rows<D, R...>;
  using Sums = RowScaledFloats<typename D::V>;
  fill_finishes<typename D::V, Sums, float>(row.finish[0]);
  fill_finishes<typename D::V, Sums, std::uint16_t>(row.finish[1]);
  return row;
}

}  // namespace prunekern
