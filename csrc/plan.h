// What one call does besides arithmetic: checked indices, the output columns each panel owns,
// the columns of x that are read.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel.h"

namespace prunekern {

// Throws std::invalid_argument, in the name of `op`, unless index[0..count) is strictly ascending within
// [0, size).
void check_index(const char* op, const char* name, const std::int64_t* index, std::int64_t count,
                 std::int64_t size);

// Panel p owns the output columns from its first channel to the first of panel p + 1 (the first panel from 0,
// the last to n_out), gaps included: every output line is written by one panel, once.
struct Windows {
  std::vector<Window> all;
  std::vector<std::int64_t> first;  // [panels + 1]: panel p has all[first[p]] .. all[first[p + 1]]
};

void plan_windows(const Kernels& kernels, const std::int64_t* out_index, std::int64_t n, std::int64_t n_out,
                  Windows& windows);

// What of a row of x is read, vector by vector: in_index[k] within [0, in_features).
using Reads = std::vector<Read>;
void plan_reads(const Kernels& kernels, const std::int64_t* in_index, std::int64_t k,
                std::int64_t in_features, Reads& reads);

}  // namespace prunekern
