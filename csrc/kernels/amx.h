// What kernels/amx.cpp offers: bf16 tiles, 16 rows by 32 inputs times 32 inputs by 16 channels, sums in fp32.
#pragma once

#include "kernels/product.h"

namespace prunekern {

// Row tile: [k_steps][16][32] bf16, so that one tile is 1 KB in one piece. Panels: one step of k is 2 KB, two
// tiles. A thread's tiles are in use between begin and end: afterwards they are as nobody had touched them,
// for others (oneDNN) who use tiles of other shapes, and for cheaper context switches.
extern const Product kAmxBf16;

}  // namespace prunekern
