// AVX-VNNI: int4, tiles as in avx2_int4.cpp.
#include "kernels/avx2.h"
#include "kernels/int4_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx2VnniInt4 = make_int4_product<Int4Vnni<Avx2, 3>, 1, 2, 3>(1, kAlways);

}  // namespace prunekern
