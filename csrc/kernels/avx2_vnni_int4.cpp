// AVX-VNNI: int4, as in avx512_vnni_int4.cpp.
#include "kernels/int4_avx2.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Vnni256 : Int4Avx2 {
  static Sum start(const char* p) { return _mm256_set1_epi32(four_bytes(p)); }
  static Sum dot(Sum sum, Bytes codes, Bytes x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else  // the same instruction, encoded for AVX-512: for the test of this file on a CPU that has only that
    return _mm256_dpbusd_epi32(sum, codes, x);
#endif
  }
  static V::F total(Sum sum, const char*) { return _mm256_cvtepi32_ps(sum); }
};

}  // namespace

constexpr Product kAvx2VnniInt4 = make_int4_product<Vnni256, 1, 2, 3>(1, kAlways);

}  // namespace prunekern
