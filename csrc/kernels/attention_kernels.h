// What attention needs of an instruction set besides the tiles of kernel.h. Panels are those of the tiles:
// w = 2 vectors wide.
#pragma once

#include <cstdint>

namespace prunekern {

// Keys of one head, transposed: panels [ceil(n / w), d, w]; keys that the last panel lacks are zero, in as
// many whole vectors as hold a key.
struct PackKeysArgs {
  const float* keys;        // channel 0 of this head
  const std::int64_t* row;  // [n]: where each key starts, in elements from `keys`
  std::int64_t n, d;
  float scale;
  float* panels;
};

// Values of one head: panels [ceil(d / w), n, w], channels that the last panel lacks are zero.
struct PackValuesArgs {
  const float* values;
  const std::int64_t* row;  // [n]
  std::int64_t n, d;
  float* panels;
};

// Rows that will be read next: begun to be drawn while the last ones of a call are multiplied.
struct NextRows {
  const float* data = nullptr;
  const std::int64_t* row = nullptr;  // [n]: where each starts, in elements from `data`
  std::int64_t n = 0, d = 0;
};

// Up to kMaxLoneRows queries x keys that are read where they lie: scores as tiles would leave them, times
// scale.
struct ScoreArgs {
  const float* q;
  std::int64_t q_stride, rows;
  const float* keys;        // channel 0 of this head
  const std::int64_t* row;  // [n]: where each key starts, in elements from `keys`
  std::int64_t n, d;
  float scale;
  float* scores;  // [ceil(n / w), rows, w]; past n, up to a whole vector, anything
  NextRows next;
};

// acc = p times values that are read where they lie.
struct WeighArgs {
  const float* p;
  std::int64_t p_stride, rows;
  const float* values;
  const std::int64_t* row;  // [n]
  std::int64_t n, d;
  float* acc;  // [ceil(d / w), rows, w]
  NextRows next;
};

// One block of keys of the online softmax, logits in units of log 2:
// p = 2^(score - new max), decay = 2^(old max - new max), sum = decay * old sum + sum of p.
struct SoftmaxArgs {
  const float* scores;   // [ceil(n / w), rows, w], as the tiles leave them
  std::int64_t rows, n;  // n: keys of this block
  const float* present;  // [w]: 1 for the keys of the last panel, 0 for what it lacks
  float* p;              // [rows, ceil(n / w) * w]
  std::int64_t p_stride;
  float *max, *sum, *decay;  // [kMaxLanes], running; before the first block max is the lowest float and sum 0
};

// y = (before y + acc) after, row by row: sums of a block of keys into what the blocks before it left in y.
struct CombineArgs {
  const float* acc;  // [rows, w]
  std::int64_t rows, columns;
  const float* before;  // [rows], or null: y is written without being read
  const float* after;   // [rows]
  float* y;
  std::int64_t y_stride;
};

// What positions add to scores.
struct AddPositionsArgs {
  float* scores;         // [ceil(n / w), rows, w]
  std::int64_t rows, n;  // n: keys
  const float* by_key;   // like scores, or null
  // Row r from by_query + r * by_query_stride on, readable up to a whole panel, or null.
  const float* by_query;
  std::int64_t by_query_stride;
};

constexpr int kMaxLoneRows = 4;  // with 8 and more, packing for tiles takes less time (lone_query.h)
constexpr int kMaxLanes = 16;    // floats of the widest vector: one lane for each row of a tile

struct AttentionKernels {
  void (*pack_keys)(const PackKeysArgs&);
  void (*pack_values)(const PackValuesArgs&);
  void (*softmax)(const SoftmaxArgs&);
  void (*combine)(const CombineArgs&);
  void (*score)(const ScoreArgs&);
  void (*weigh)(const WeighArgs&);
  void (*add_positions)(const AddPositionsArgs&);
};

}  // namespace prunekern
