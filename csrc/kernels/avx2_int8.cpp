// AVX2 without VNNI: int8, tiles of 4 rows by 2 vectors of 8 channels (8 sums, 4 weights, 2 broadcasts: 14 of
// 16 registers).
//
// vpmaddubsw adds two products in 16 bits and saturates; what is exact are 16-bit values through vpmaddwd:
// inputs 0 and 2 of every four, then 1 and 3. Two multiplications and two additions for what fp32 does in
// four multiply-adds.
#include "kernels/avx2.h"
#include "kernels/int8_groups.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

struct Madd256 : Int8Groups<Madd256, 4, 8, 0> {
  using V = Avx2;
  using Sum = __m256i;
  struct Halves {
    __m256i even, odd;  // inputs 0 and 2, 1 and 3
  };
  using Weights = Halves;
  using X = Halves;

  static Weights weights(const char* p) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), _mm256_srai_epi16(four, 8)};
  }
  static X x(const char* p) {
    return {_mm256_set1_epi32(four_bytes(p)), _mm256_set1_epi32(four_bytes(p + 4))};
  }
  static Sum dot(Sum acc, const Weights& weights, const X& x) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(weights.even, x.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(weights.odd, x.odd));
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum start(const char*, int) { return zero(); }
  static Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static void store(float* p, Sum a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static std::int32_t sum(Sum) { return 0; }  // needs none
  static void put(char* to, V::F scaled, Sum&) {
    // 16 bits each: in each half 0 1 2 3 -> 0 2 1 3.
    const __m256i q = _mm256_cvtps_epi32(scaled);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
  }
};

}  // namespace

// Few rows wait for weights, and are twice as fast in a quarter of the bytes. More are as many operations as
// fp32: 8 rows and more gain 10 % at most here (EPYC), and would lose half where vpmaddwd has one unit
// (Haswell).
constexpr std::int64_t kFewRows = 6;

constexpr Product kAvx2Int8 = make_dot_product<Madd256, RowScaledSums<Avx2>, 1, 2, 3, 4>(
    WeightType::int8, Arithmetic::int8, 1, kFewRows);

}  // namespace prunekern
