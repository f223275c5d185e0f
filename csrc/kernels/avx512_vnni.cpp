// AVX-512 VNNI: int8, tiles of 14 rows by 2 vectors of 16 channels.
//
// vpdpbusd multiplies unsigned by signed. Weights become unsigned by adding 128 (one xor for each vector,
// that is 2 for 28 products: not to be seen on an EPYC, whose xor goes to units the products leave free, 7 %
// at most on a Xeon), so that the sums are too large by 128 times the sum of the row of x: they begin with
// minus that.
#include "kernels/avx512.h"
#include "kernels/int8_groups.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Vnni512 : Int8Groups<Vnni512, 14, 4, 128> {
  using V = Avx512;
  using Sum = __m512i;
  using Weights = __m512i;
  using X = __m512i;

  static Weights weights(const char* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static X x(const char* p) { return _mm512_set1_epi32(four_bytes(p)); }
  static Sum dot(Sum acc, Weights weights, X x) { return _mm512_dpbusd_epi32(acc, weights, x); }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum start(const char* tail, int r) { return _mm512_set1_epi32(start_of(tail, r)); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static void store(float* p, Sum a) { _mm512_storeu_si512(p, a); }
  static std::int32_t sum(Sum a) { return _mm512_reduce_add_epi32(a); }
  static void put(char* to, V::F scaled, Sum& total) {
    const __m512i q = _mm512_cvtps_epi32(scaled);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(q));
  }
};

}  // namespace

constexpr Product kAvx512VnniInt8 =
    make_dot_product<Vnni512, RowScaledSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(
        WeightType::int8, Arithmetic::int8, 1, kAlways);

}  // namespace prunekern
