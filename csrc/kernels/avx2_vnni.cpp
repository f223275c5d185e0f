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
  static std::int32_t sum(Sum a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  static void put(char* to, V::F scaled, Sum& total) {
    const __m256i q = _mm256_cvtps_epi32(scaled);
    total = _mm256_add_epi32(total, q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
};

}  // namespace

constexpr Product kAvx2VnniInt8 = make_dot_product<Vnni256, RowScaledSums<Avx2>, 1, 2, 3, 4, 5, 6>(
    WeightType::int8, Arithmetic::int8, 1, kAlways);

}  // namespace prunekern
