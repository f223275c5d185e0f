// AVX-512 VNNI: int4, tiles as in avx512_int4.cpp.
#include "kernels/avx512.h"
#include "kernels/int4_vectors.h"
#include "kernels/products.h"

namespace prunekern {

constexpr Product kAvx512VnniInt4 = make_int4_product<Int4Vnni<Avx512, 6>, 1, 2, 3, 4, 5, 6>(1, kAlways);

}  // namespace prunekern
