// What a kernel file offers to the loops: a table of functions and sizes. Kernel files know nothing of
// layers, indices or threads; the loops know nothing of instruction sets. Which table a CPU gets, and with
// which rows, is said in cpu/table.cpp.
#pragma once

#include <cstdint>

#include "kernels/attention_kernels.h"
#include "prunekern/linear.h"

namespace prunekern {

// acc [rows, width] = a [rows, k] times panel [k, width]; with `accumulate` it is added to what acc holds.
struct TileArgs {
  const float* a;
  std::int64_t a_stride;
  const float* panel;
  std::int64_t k;
  float* acc;
  bool accumulate;

  // What will be needed soon, drawn into the caches on the way. Every 4 steps of k: so many lines of weights
  // (0: none), and what the epilogue will touch of one more row of y and of the residual (null: none). Steps
  // in bytes.
  const char* next_weights;
  std::int64_t next_lines;
  const char* y;
  std::int64_t y_step;
  const char* residual;
  std::int64_t residual_step;
  std::int64_t row_lines;
};

// acc [rows, width] = a [rows, k] times a panel of bf16 or int8 weights (without the scale) as pack_weight
// made it. ahead: bytes from what is read to what is drawn into L2, or past it into L1.
struct StreamArgs {
  const float* a;
  std::int64_t a_stride;
  const void* panel;
  std::int64_t k;
  float* acc;
  std::int64_t ahead;
  bool into_l1;
};

// A panel in fp32: [k, width] from what pack_weight made of it, for bf16, int8 (without the scale) and int4
// (with its scales). It begins at, and is written up to, a multiple of Layout::side_by_side inputs, of four
// at least. The tile reads it from L1.
struct WidenArgs {
  const void* panel;
  std::int64_t k;
  float* to;
};

// Up to one vector of consecutive columns of x, and where they go.
struct Read {
  std::int64_t column;  // first column
  std::int32_t target;  // place of the first one taken
  std::uint32_t mask;   // bit i: column + i is taken
};

// Rows of x as tiles read them: fp32, kept columns side by side.
struct TakeArgs {
  const void* x;  // float, or std::uint16_t (bf16)
  std::int64_t x_stride;
  std::int64_t rows, columns;
  const Read* reads;  // null: all columns
  std::int64_t n_reads;
  float* to;  // [rows, to_stride], writable one vector past the last column of each row
  std::int64_t to_stride;
};

// Up to one vector of consecutive output columns, and where its values come from.
struct Window {
  std::int64_t column;  // first output column
  std::int32_t source;  // first value, an index into the acc row
  std::int32_t width;   // columns written
  std::uint32_t mask;   // bit i: column + i takes the next value of acc; otherwise it is a gap and takes zero
};

// Writes act(acc * scale + bias) into the windows of every row, plus the residual. acc is scratch and is
// overwritten.
struct EpilogueArgs {
  float* acc;  // [rows, width], readable one vector past its end
  std::int64_t rows;
  const float* scale;  // [width]: of int8 weights, otherwise ones
  const float* bias;   // [width], padded with zeros
  const Window* windows;
  std::int64_t n_windows;
  const void* residual;  // float or std::uint16_t (bf16), at (first row, column 0), or null
  std::int64_t residual_stride;
  void* y;  // the same type, at (first row, column 0)
  std::int64_t y_stride;
};

// y = weight * (x - mean) / sqrt(variance + eps) + bias, row by row; y may be x.
struct LayerNormArgs {
  const float* x;
  std::int64_t x_stride;
  std::int64_t rows, n;
  const float *weight, *bias;  // [n]
  float eps;
  float* y;  // [rows, n]
};

using TileFn = void (*)(const TileArgs&);
using StreamFn = void (*)(const StreamArgs&);
using WidenFn = void (*)(const WidenArgs&);
using TakeFn = void (*)(const TakeArgs&);
using EpilogueFn = void (*)(const EpilogueArgs&);
using LayerNormFn = void (*)(const LayerNormArgs&);
using PeakFn = std::int64_t (*)(std::int64_t steps);
using ReadFn = std::uint64_t (*)(const char* memory, std::int64_t bytes);

constexpr int kMaxRows = 14;
constexpr int kMaxStreamRows = 8;  // more would not leave registers for two steps of weights
constexpr int kMaxWidth = 32;
constexpr int kActivations = 6;
constexpr int kElements = 2;
constexpr int kWeightTypes = 4;

constexpr int kMaxProducts = 8;

struct Product;  // kernels/product.h

struct Kernels {
  int width;                       // columns of a panel
  int vector;                      // floats of a vector: widest window
  int rows;                        // most rows of a tile
  int stream_rows;                 // most rows of a stream
  TileFn tile[kMaxRows + 1];       // by rows, from 1
  TileFn half_tile[kMaxRows + 1];  // the same for a panel with nothing in its second vector
  WidenFn widen[kWeightTypes];     // by WeightType; null for fp32, which the tile reads where it is
  StreamFn stream[kWeightTypes][kMaxStreamRows + 1];  // by WeightType and rows, from 1; bf16 and int8 only
  TakeFn take[kElements];                             // by Element of x
  EpilogueFn epilogue[kElements][kActivations];       // by Element of y and the residual, and by Activation
  const Product* products[kMaxProducts];  // rows besides fp32 arithmetic, the better one later; or null
  LayerNormFn layer_norm;
  PeakFn peak;  // multiply-adds and nothing else; returns how many flops that was
  ReadFn read;  // reads memory once, returns a checksum
  AttentionKernels attention;
  const Product* heads;  // products of attention in bf16, as many rows as the tiles have; or null
};

extern const Kernels kGenericKernels;
#ifdef PRUNEKERN_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace prunekern
