// AVX-512 without VNNI: int8, tiles of 12 rows by 2 vectors of 16 channels (24 sums, 4 weights, 2 broadcasts:
// 30 of 32 registers).
#include "kernels/avx512.h"
#include "kernels/int8_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr std::int64_t kFewRows = 6;  // as in avx2_int8.cpp

constexpr Product kAvx512Int8 =
    make_dot_product<Int8Madd<Avx512, 12>, RowScaledSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>(
        WeightType::int8, Arithmetic::int8, 1, kFewRows);

}  // namespace prunekern
