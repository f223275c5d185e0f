// The output columns that each panel owns.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel.h"

namespace prunekern {

// Panel p owns the output columns from its first channel to the first of panel p + 1 (the first panel from 0,
// the last to n_out), gaps included: every output line is written by one panel, once.
struct Windows {
  std::vector<Window> all;
  std::vector<std::int64_t> first;  // [panels + 1]: panel p has all[first[p]] .. all[first[p + 1]]
};

// Of n channels at out_index (null: at 0 .. n - 1) of n_out columns.
void make_windows(const Kernels& kernels, const std::int64_t* out_index, std::int64_t n, std::int64_t n_out,
                  Windows& windows);

}  // namespace prunekern
