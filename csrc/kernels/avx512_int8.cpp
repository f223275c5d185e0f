// AVX-512 without VNNI: int8 as in avx2_int8.cpp, tiles of 12 rows by 2 vectors of 16 channels (24 sums, 4
// weights, 2 broadcasts: 30 of 32 registers).
#include "kernels/avx512.h"
#include "kernels/int8_groups.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Madd512 : Int8Groups<Madd512, 12, 8, 0> {
  using V = Avx512;
  using Sum = __m512i;
  struct Halves {
    __m512i even, odd;  // inputs 0 and 2, 1 and 3
  };
  using Weights = Halves;
  using X = Halves;

  static Weights weights(const char* p) {
    const __m512i four = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), _mm512_srai_epi16(four, 8)};
  }
  static X x(const char* p) {
    return {_mm512_set1_epi32(four_bytes(p)), _mm512_set1_epi32(four_bytes(p + 4))};
  }
  static Sum dot(Sum acc, const Weights& weights, const X& x) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(weights.even, x.even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(weights.odd, x.odd));
  }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum start(const char*, int) { return zero(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static void store(float* p, Sum a) { _mm512_storeu_si512(p, a); }
  static std::int32_t sum(Sum) { return 0; }  // needs none
  static void put(char* to, V::F scaled, Sum&) {
    // 16 bits each: in each four 0 1 2 3 -> 0 2 1 3.
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  }
};

}  // namespace

constexpr std::int64_t kFewRows = 6;  // as in avx2_int8.cpp

constexpr Product kAvx512Int8 =
    make_dot_product<Madd512, RowScaledSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>(
        WeightType::int8, Arithmetic::int8, 1, kFewRows);

}  // namespace prunekern
