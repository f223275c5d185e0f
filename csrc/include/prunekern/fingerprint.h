// A number of a matrix's values, to tell later whether it was written to.
#pragma once

#include <cstdint>

namespace prunekern {

// Which values of the matrix enter:
//   few    9, spread over rows and columns: from memory each is a page of its own; whatever changes the
//          matrix as a whole changes them
//   lines  one of every row and of every column at least: what changes a whole row or column changes one
//   all    every one
enum class Look : int { few = 0, lines = 1, all = 2 };

struct MatrixView {
  const void* data = nullptr;
  std::int64_t rows = 0, columns = 0;
  std::int64_t row_stride = 0, column_stride = 0;  // in values
  int bytes = 4;                                   // of a value: 1, 2, 4 or 8
};

// Of the bits of the values: 0.0 and -0.0 differ. Throws std::invalid_argument for sizes below zero, a width
// that is none, and for values without memory.
std::uint64_t fingerprint(const MatrixView& matrix, Look look);

// Draws what `fingerprint` will read of a few values into the cache.
void draw_fingerprint(const MatrixView& matrix, Look look);

}  // namespace prunekern
