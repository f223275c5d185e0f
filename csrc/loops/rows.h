// The rows of x: which of their columns are read, and how fp32 arithmetic gets them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel.h"
#include "loops/scratch.h"
#include "loops/shares.h"

namespace prunekern {

// What of a row of x is read, vector by vector: in_index[k] within [0, in_features).
using Reads = std::vector<Read>;
void make_reads(const Kernels& kernels, const std::int64_t* in_index, std::int64_t k,
                std::int64_t in_features, Reads& reads);

// x of a call.
struct Input {
  const void* x;
  std::int64_t stride, in_features, k;
  Element element;
  const Reads* reads;  // null: all columns
};

struct Rows {
  const float* data;  // [rows, k]
  std::int64_t stride;
};

// x itself where the tiles can read it, otherwise a copy in scratch: gathered, widened from bf16.
Rows take_rows(const Input& input, const Kernels& kernels, Range rows, Scratch& scratch);

}  // namespace prunekern
