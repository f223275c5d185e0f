// AVX2 + FMA: tiles of 6 rows by 2 vectors of 8 (12 accumulators, 2 weights, 1 broadcast: 15 of 16
// registers).
#include "kernels/avx2.h"

#include "kernels/make_table.h"

namespace prunekern {

constexpr Kernels kAvx2Kernels = make_kernels<Avx2, 1, 2, 3, 4, 5, 6>();

}  // namespace prunekern
