// AVX-512 VNNI: int4. Codes are the unsigned operand of vpdpbusd as they are.
#include "kernels/int4_avx512.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Vnni512 : Int4Avx512 {
  static Sum start(const char* p) { return _mm512_set1_epi32(four_bytes(p)); }
  static Sum dot(Sum sum, Bytes codes, Bytes x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  static V::F total(Sum sum, const char*) { return _mm512_cvtepi32_ps(sum); }
};

}  // namespace

constexpr Product kAvx512VnniInt4 = make_int4_product<Vnni512, 1, 2, 3, 4, 5, 6>(1, kAlways);

}  // namespace prunekern
