// A row of the table: one way of multiplying that is no fp32 arithmetic. Its kernel file says what it
// multiplies, from how many rows on it is worth while, how it wants rows of x, and gives three functions; the
// loops (loops/prepared.h, loops/pipeline.h) do the rest, for every row alike.
//
// Rows of x are prepared once for a block, as row tiles of `tile_rows` rows: rounded, quantised by row,
// whatever the row multiplies. Only its functions look into them.
//   row tile: [k_steps][tile_rows, step_inputs], k_steps = ceil(k / step_inputs), then what it says of its
//   rows (scales); k_steps * step_bytes + tail_bytes in all. Missing rows and inputs are zero.
// Panels are those of pack_weight.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

namespace prunekern {

// Contiguous rows of x as row tiles.
struct PrepareArgs {
  const void* x;  // float, or std::uint16_t (bf16)
  std::int64_t x_stride;
  std::int64_t rows, k;
  char* to;  // [ceil(rows / tile_rows)] row tiles
};

// What becomes of the sums of one row tile.
struct Finish {
  EpilogueArgs args;  // acc: [rows, width], rows <= tile_rows, as the product leaves sums: fp32, or int32
  const char* tail;   // of the row tile they were made of: what it says of its rows
  const float* by;    // [rows, width]: what the activated sums are multiplied with; null: nothing
  bool keep;          // they stay in acc, nothing is written
  std::int64_t activated, written;  // rows done so far
};
// Goes on with up to `rows` rows of a finish. Not before its row tile is complete.
using FinishFn = void (*)(Finish& finish, std::int64_t rows);

// acc [row_tiles][tile_rows, width] = x times one panel. Every finish of the row tiles before is complete
// when this returns: a product that leaves the vector units idle does them in its shadow.
struct ProductArgs {
  const char* x;  // row_tiles of them, row_tile_bytes apart
  std::int64_t row_tiles, row_tile_bytes;
  const char* panel;
  std::int64_t readable;  // bytes from `panel` on: a weight may end within the last step of its last panel
  std::int64_t k_steps;
  float* acc;
  const char* next_weights;  // will be needed soon: so many lines at every step of k
  std::int64_t next_lines;
  // What its own finish will write and read: rows of so many lines (0: nothing to fetch), steps in bytes.
  const char* y;
  std::int64_t y_step;
  const char* residual;  // or null
  std::int64_t residual_step;
  bool half;                     // only the first half of the panel's channels is wanted; may be ignored
  std::int64_t rows, row_lines;  // rows: of x; those that are missing from the row tiles need no sums
  Finish* before;                // n_before of them
  std::int64_t n_before;
  FinishFn finish;
};

using MultiplyFn = void (*)(const ProductArgs&);

struct Product {
  WeightType weights;                   // what it multiplies
  Arithmetic arithmetic;                // int8: x is rounded to int8, row by row
  std::int64_t least_rows[kElements];   // from how many rows on it is faster, by Element of x; kNever
  std::int64_t most_rows;               // up to how many
  std::int64_t tile_rows, row_tiles;    // rows of a row tile; row tiles of one product, at most kMaxRowTiles
  std::int64_t step_inputs;             // inputs of one step of k
  std::int64_t step_bytes, tail_bytes;  // of a row tile
  std::int64_t panel_step_bytes;        // of a panel, one step of k

  // Around all of its products on a thread, for what a thread must set up first; or null.
  void (*begin)();
  void (*end)();
  void (*prepare[kElements])(const PrepareArgs&);  // by Element of x
  MultiplyFn multiply;
  FinishFn finish[kElements][kActivations];  // by Element of y and the residual, and by Activation

  // Between the layers of an mlp: points args at where the next layer's row tile (at `tile`) takes the
  // outputs of one panel, in `between`; so the rows in between are prepared as they are made. Null where a
  // row must be whole first (its scale follows from all of it): they are then kept in fp32.
  void (*place)(char* tile, std::int64_t k_steps, std::int64_t panel, EpilogueArgs& args);
  Element between;

  // fp32 panels [panels][k, width] as this multiplies them, [panels] of k_steps * panel_step_bytes; or null.
  void (*pair_up)(const float* from, std::int64_t panels, std::int64_t k, char* to);

  PeakFn peak;  // its multiply-adds and nothing else, as in Kernels; or null
};

constexpr std::int64_t kNever = INT64_MAX, kAlways = INT64_MAX;  // of least_rows, of most_rows
constexpr int kMaxRowTiles = 2;                                  // of one product
constexpr std::int64_t kMaxProductSums = 1024;                   // row_tiles * tile_rows * width

}  // namespace prunekern
