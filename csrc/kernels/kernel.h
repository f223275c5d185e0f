// What a kernel file offers to the loops: two functions and three sizes. Kernel files know nothing of layers,
// indices or threads; the loops know nothing of instruction sets.
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "prunekern/linear.h"

namespace prunekern {

// acc [rows, width] = a [rows, k] times one panel [k, width].
struct TileArgs {
  const float* a;
  std::int64_t a_stride;
  const float* panel;
  std::int64_t k;
  float* acc;

  // What will be needed soon, drawn into the caches on the way. Every 4 steps of k: so many lines of weights
  // (0: none), and what the epilogue will touch of one more row of y and of the residual (null: none).
  const float* next_weights;
  std::int64_t next_lines;
  const float* y;
  std::int64_t y_stride;
  const float* residual;
  std::int64_t residual_stride;
  std::int64_t row_lines;
};

// Up to one vector of consecutive output columns, and where its values come from.
struct Window {
  std::int64_t column;  // first output column
  std::int32_t source;  // first value, an index into the acc row
  std::int32_t width;   // columns written
  std::uint32_t mask;   // bit i: column + i takes the next value of acc; otherwise it is a gap and takes zero
};

// Writes act(acc + bias) into the windows of every row, plus the residual. acc is scratch and is overwritten.
struct EpilogueArgs {
  float* acc;  // [rows, width], readable one vector past its end
  std::int64_t rows;
  const float* bias;  // [width], padded with zeros
  const Window* windows;
  std::int64_t n_windows;
  const float* residual;  // at (first row, column 0), or null
  std::int64_t residual_stride;
  float* y;  // at (first row, column 0)
  std::int64_t y_stride;
};

using TileFn = void (*)(const TileArgs&);
using EpilogueFn = void (*)(const EpilogueArgs&);

using PeakFn = std::int64_t (*)(std::int64_t steps);

constexpr int kMaxRows = 14;
constexpr int kMaxWidth = 32;
constexpr int kActivations = 5;

struct Kernels {
  int width;                          // columns of a panel
  int vector;                         // floats of a vector: widest window
  int rows;                           // most rows of a tile
  TileFn tile[kMaxRows + 1];          // by rows, from 1
  TileFn half_tile[kMaxRows + 1];     // the same for a panel with nothing in its second vector
  PeakFn peak;                        // multiply-adds and nothing else; returns how many flops that was
  EpilogueFn epilogue[kActivations];  // by Activation
  AttentionKernels attention;
};

extern const Kernels kGenericKernels;
#ifdef PRUNEKERN_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table of an instruction set; throws std::runtime_error where this CPU cannot run it.
const Kernels& kernels(Isa isa);

}  // namespace prunekern
