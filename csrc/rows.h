// The rows of x that one block of compact_linear reads.
#pragma once

#include "blocks.h"
#include "kernels/kernel.h"
#include "plan.h"

namespace prunekern {

struct Rows {
  const float* data;  // [rows, k]
  std::int64_t stride;
};

// x itself where the tiles can read it, otherwise a copy in scratch: gathered, widened from bf16.
Rows take_rows(const LinearCall& call, const Kernels& kernels, const Reads& reads, Range rows,
               Scratch& scratch);

}  // namespace prunekern
