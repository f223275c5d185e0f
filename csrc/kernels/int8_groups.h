// What all int8 products have in common but their instructions. D: the struct derived from this.
#pragma once

#include "kernels/dot.h"
#include "kernels/quantize.h"

namespace prunekern {

// A group is four inputs of a row, `bytes` long. offset: what is added to weights to make them unsigned.
template <class D, int rows, int bytes, int offset>
struct Int8Groups {
  static constexpr int kRows = rows, kGroups = 4, kGroupInputs = 4, kGroupBytes = bytes;
  static constexpr int kUnsignedOffset = -offset, kTailBytes = sizeof(RowTail<rows>);
  static constexpr bool kHasPeak =
      offset != 0;  // the others share work that a loop without memory would do once

  static int four_bytes(const char* p) {
    int value;
    __builtin_memcpy(&value, p, 4);
    return value;
  }
  static std::int32_t start_of(const char* tail, int row) {
    return reinterpret_cast<const RowTail<rows>*>(tail)->start[row];
  }
  template <class T>
  static void prepare(const PrepareArgs& args) {
    quantize_rows<D, T>(args);
  }
};

}  // namespace prunekern
