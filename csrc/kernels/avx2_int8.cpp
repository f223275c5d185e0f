// AVX2 without VNNI: int8, tiles of 4 rows by 2 vectors of 8 channels (8 sums, 4 weights, 2 broadcasts: 14 of
// 16 registers).
#include "kernels/avx2.h"
#include "kernels/int8_vectors.h"
#include "kernels/products.h"

namespace prunekern {

// Few rows wait for weights, and are twice as fast in a quarter of the bytes. More are as many operations as
// fp32: 8 rows and more gain 10 % at most here (EPYC), and would lose half where vpmaddwd has one unit
// (Haswell).
constexpr std::int64_t kFewRows = 6;

constexpr Product kAvx2Int8 = make_dot_product<Int8Madd<Avx2, 4>, RowScaledSums<Avx2>, 1, 2, 3, 4>(
    WeightType::int8, Arithmetic::int8, 1, kFewRows);

}  // namespace prunekern
