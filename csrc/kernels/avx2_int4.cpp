// AVX2 without VNNI: int4. vpmaddubsw adds two products in 16 bits and saturates, but not here: a lane takes
// 16 products of a group, at most 15 * 127 each, and 16 * 15 * 127 = 30,480 fit.
#include "kernels/int4_avx2.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Madd256 : Int4Avx2 {
  static Sum start(const char*) { return _mm256_setzero_si256(); }
  static Sum dot(Sum sum, Bytes codes, Bytes x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }
  static V::F total(Sum sum, const char* p) {
    const __m256i whole = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(whole, _mm256_set1_epi32(four_bytes(p))));
  }
};

}  // namespace

constexpr Product kAvx2Int4 = make_int4_product<Madd256, 1, 2, 3>(1, kAlways);

}  // namespace prunekern
