// AVX-512 VNNI: int8, tiles of 14 rows by 2 vectors of 16 channels (28 sums, 2 weights, 1 broadcast: 31 of 32
// registers).
#include "kernels/avx512.h"
#include "kernels/int8_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx512VnniInt8 =
    make_dot_product<Int8Vnni<Avx512, 14>, RowScaledSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                     14>(WeightType::int8, Arithmetic::int8, 1, kAlways);

}  // namespace prunekern
