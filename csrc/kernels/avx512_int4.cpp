// AVX-512 without VNNI: int4 as in avx2_int4.cpp.
#include "kernels/int4_avx512.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Madd512 : Int4Avx512 {
  static Sum start(const char*) { return _mm512_setzero_si512(); }
  static Sum dot(Sum sum, Bytes codes, Bytes x) {
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, x));
  }
  static V::F total(Sum sum, const char* p) {
    const __m512i whole = _mm512_madd_epi16(sum, _mm512_set1_epi16(1));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(whole, _mm512_set1_epi32(four_bytes(p))));
  }
};

}  // namespace

constexpr Product kAvx512Int4 = make_int4_product<Madd512, 1, 2, 3, 4, 5, 6>(1, kAlways);

}  // namespace prunekern
