// AVX-VNNI: int8, tiles of 6 rows by 2 vectors of 8 channels (12 sums, 2 weights, 1 broadcast: 15 of 16
// registers).
#include "kernels/avx2.h"
#include "kernels/int8_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx2VnniInt8 = make_dot_product<Int8Vnni<Avx2, 6>, RowScaledSums<Avx2>, 1, 2, 3, 4, 5, 6>(
    WeightType::int8, Arithmetic::int8, 1, kAlways);

}  // namespace prunekern
