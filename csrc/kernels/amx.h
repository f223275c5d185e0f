// What kernels/amx.cpp offers: bf16 tiles, 16 rows by 32 inputs times 32 inputs by 16 channels, sums in fp32.
//
// Rows of x come as tiles: [row tiles][k_steps][16][32] bf16, so that one tile is 1 KB in one piece; k_steps
// = ceil(k / 32), missing inputs are zero. Panels are those of pack_weight: one step of k is 2 KB, two tiles.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace prunekern {

constexpr int kTileRows = 16, kTileInputs = 32, kTileValues = kTileRows * kTileInputs, kPanelWidth = 32;

// What becomes of the sums of one row tile.
struct AmxFinish {
  EpilogueArgs args;                // acc: [rows, 32], rows <= 16
  const float* by;                  // [rows, 32]: what the activated sums are multiplied with; null: nothing
  bool keep;                        // they stay in acc, nothing is written
  std::int64_t activated, written;  // rows done so far
};
// Goes on with up to `rows` rows of a finish. Not before its tile is complete.
using AmxFinishFn = void (*)(AmxFinish& finish, std::int64_t rows);

// acc [row_tiles][16][32] = a times one panel, while the tiles before are finished in the shadow.
struct AmxTileArgs {
  const std::uint16_t* a;  // [row_tiles][k_steps][16][32]
  std::int64_t row_tiles;  // 1 or 2
  const char* panel;       // [k_steps][16][32][2]
  std::int64_t k_steps;
  float* acc;
  const char* next_weights;  // will be needed soon: so many lines at every step of k
  std::int64_t next_lines;
  // What this tile's own finish will write and read: rows of so many lines (0: nothing to fetch), steps in
  // bytes.
  const char* y;
  std::int64_t y_step;
  const char* residual;  // or null
  std::int64_t residual_step;
  std::int64_t rows, row_lines;
  AmxFinish* before;  // n_before of them, finished when this returns
  std::int64_t n_before;
  AmxFinishFn finish;
};

// Contiguous rows of x as tiles.
struct AmxTakeArgs {
  const void* x;  // float, or std::uint16_t (bf16)
  std::int64_t x_stride;
  std::int64_t rows, k;
  std::uint16_t* to;  // [ceil(rows / 16)][ceil(k / 32)][16][32]; missing rows are zero
};

struct AmxSelfTest {
  bool failed = false;
  float got = 0.0f, want = 0.0f;
};

// Between these two a thread's tiles are in use: afterwards they are as nobody had touched them, for others
// (oneDNN) who use tiles of other shapes, and for cheaper context switches.
void amx_begin();
void amx_end();

void amx_tile(const AmxTileArgs& args);
void amx_take(const AmxTakeArgs& args, bool is_bf16);
AmxFinishFn amx_finish(bool to_bf16, Activation activation);
std::int64_t amx_peak(std::int64_t steps);

// A product of small integers, through amx_tile, beside plain arithmetic.
AmxSelfTest amx_self_test();

}  // namespace prunekern
