// AVX2 without VNNI: int4, tiles of 3 rows by 2 vectors of 8 channels (6 integer and 6 fp32 sums, 2 vectors
// of codes, 1 broadcast, 1 mask: 16 of 16 registers).
#include "kernels/avx2.h"
#include "kernels/int4_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx2Int4 = make_int4_product<Int4Madd<Avx2, 3>, 1, 2, 3>(1, kAlways);

}  // namespace prunekern
