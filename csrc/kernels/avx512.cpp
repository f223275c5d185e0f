// AVX-512: tiles of 14 rows by 2 vectors of 16.
#include "kernels/avx512.h"

#include "kernels/make_table.h"

namespace prunekern {

constexpr Kernels kAvx512Kernels = make_kernels<Avx512, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>();

}  // namespace prunekern
