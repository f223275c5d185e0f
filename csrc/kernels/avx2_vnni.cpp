// AVX-VNNI: int8, tiles of 6 rows by 2 vectors of 8 channels (12 sums, 2 weights, 1 broadcast: 15 of 16
// registers). Weights become unsigned as in avx512_vnni.cpp.
#include "kernels/avx2.h"
#include "kernels/int8_groups.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Vnni256 : Int8Groups<Vnni256, 6, 4, 128> {
  using V = Avx2;
  using Sum = __m256i;
  using Weights = __m256i;
  using X = __m256i;

  static Weights weights(const char* p) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                            _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static X x(const char* p) { return _mm256_set1_epi32(four_bytes(p)); }
  static Sum dot(Sum acc, Weights weights, X x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, weights, x);
#else  // the same instruction, encoded for AVX-512: for the test of this file on a CPU that has only that
    return _mm256_dpbusd_epi32(acc, weights, x);
#endif
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum start(const char* tail, int r) { return _mm256_set1_epi32(start_of(tail, r)); }
  static Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static void store(float* p, Sum a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static void put(char* to, V::F q) {
    const __m256i whole = _mm256_cvtps_epi32(q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    put_four(to, _mm_cvtsi128_si32(bytes));
    put_four(to + kBetween, _mm_extract_epi32(bytes, 1));
  }
};

}  // namespace

constexpr Product kAvx2VnniInt8 = make_dot_product<Vnni256, RowScaledSums<Avx2>, 1, 2, 3, 4, 5, 6>(
    WeightType::int8, Arithmetic::int8, 1, kAlways);

}  // namespace prunekern
