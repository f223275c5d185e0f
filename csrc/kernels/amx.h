// What kernels/amx.cpp and kernels/amx_int8.cpp offer: tiles of 16 rows by 32 bf16 or 64 int8 inputs, times
// as many inputs by 16 channels, sums in fp32 or int32.
#pragma once

#include "kernels/product.h"

namespace prunekern {

// Row tile: [k_steps][16][32] bf16 or [k_steps][16][64] int8, so that one tile is 1 KB in one piece; after
// those of int8 a RowTail<16>, whose start is not used. Panels: one step of k is 2 KB, two
// tiles. A thread's tiles are in use between begin and end: afterwards they are as nobody had touched them,
// for others (oneDNN) who use tiles of other shapes, and for cheaper context switches.
extern const Product kAmxBf16, kAmxInt8;

}  // namespace prunekern
