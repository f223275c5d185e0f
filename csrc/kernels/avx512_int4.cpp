// AVX-512 without VNNI: int4, tiles of 6 rows by 2 vectors of 16 channels (12 integer and 12 fp32 sums,
// 2 vectors of codes, 1 broadcast, 1 mask: 28 of 32 registers).
#include "kernels/avx512.h"
#include "kernels/int4_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx512Int4 = make_int4_product<Int4Madd<Avx512, 6>, 1, 2, 3, 4, 5, 6>(1, kAlways);

}  // namespace prunekern
