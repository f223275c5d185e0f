// AVX2, FMA and F16C: the vector type of the files that are compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace prunekern {
namespace {  // each file its own copy

// AVX2 has neither expand nor compress: for each 8-bit mask, which source lane every lane takes.
struct Lanes {
  unsigned char expand[256][8], compress[256][8];

  constexpr Lanes() : expand(), compress() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, next = 0; i < 8; ++i)
        if (mask >> i & 1) {
          compress[mask][next] = static_cast<unsigned char>(i);
          expand[mask][i] = static_cast<unsigned char>(next++);
        }
  }
};
constexpr Lanes kLanes;
alignas(32) constexpr int kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Avx2 {
  static constexpr int kWidth = 8;
  using F = __m256;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static __m256i first(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - n)); }
  static F load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_part(float* p, F a, int n) { _mm256_maskstore_ps(p, first(n), a); }
  // This input of the four that each channel of an int8 panel has side by side.
  template <int Input>
  static F load_one_of_four(const std::int8_t* p) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(four, 24 - 8 * Input), 24));
  }
  // Lanes of eight codes of four bits: the one at this bit of each.
  template <int Shift>
  static F load_code(const char* p) {
    const __m256i codes = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Shift);
    return _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)));
  }
  static F load_half(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // Sums in int32.
  static F load_sums(const float* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // bf16: the upper half of a float.
  static F load(const std::uint16_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static F load_part(const std::uint16_t* p, int n) {  // 16-bit lanes have no masks
    std::uint16_t values[8] = {};
    for (int i = 0; i < n; ++i) values[i] = p[i];
    return load(values);
  }
  static __m128i to_bf16(F a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan =
        _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // rounding could make it infinite
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, nan, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  static void store(std::uint16_t* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
  static void store_part(std::uint16_t* p, F a, int n) {
    std::uint16_t values[8];
    store(values, a);
    for (int i = 0; i < n; ++i) p[i] = values[i];
  }
  static F load_even(const std::uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
  }
  static F load_odd(const std::uint16_t* p) {
    return _mm256_and_ps(load(reinterpret_cast<const float*>(p)),
                         _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static F permute(F a, const unsigned char* lanes) {
    return _mm256_permutevar8x32_ps(
        a, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes))));
  }
  static F compress(F a, std::uint32_t mask) { return permute(a, kLanes.compress[mask]); }
  static F expand(const float* p, std::uint32_t mask) {
    const F spread = permute(load(p), kLanes.expand[mask]);
    const __m256i bits = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i keep =
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
    return _mm256_and_ps(spread, _mm256_castsi256_ps(keep));
  }
  static F zip_low(F a, F b) {  // a0 b0 a1 b1 ... of the lower halves
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static F zip_high(F a, F b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F negative(F a) { return _mm256_xor_ps(a, set(-0.0f)); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static F madd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static F scale(F a, F n) {  // in two halves: 2^n alone leaves the range of fp32
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(a, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  // max(a, |b|) of the bits, a not negative; and the largest lane of those.
  static F max_size_bits(F a, F b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(abs(b))));
  }
  static std::uint32_t largest_bits(F a) {
    const __m256i bits = _mm256_castps_si256(a);
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(most));
  }
  static F mix(F a, F b) { return _mm256_xor_ps(a, b); }
  static F select_positive(F x, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
  }

  // Integers: lanes of 32 bits, seen as two words or four bytes where a name says so.
  using I = __m256i;
  static I set_int(int x) { return _mm256_set1_epi32(x); }
  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_int(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static I to_int(F a) { return _mm256_cvtps_epi32(a); }  // nearest even
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static int sum_int(I a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
  // Bytes 0 and 2 of every lane as words, with their sign; 1 and 3.
  static I even_bytes(I a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
  static I odd_bytes(I a) { return _mm256_srai_epi16(a, 8); }
  // The lower four bits of every byte; the upper.
  static I low_codes(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static I high_codes(I a) { return low_codes(_mm256_srli_epi16(a, 4)); }
  static I add_128_to_bytes(I a) {  // from signed to unsigned
    return _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  // sum + the products of words, by twos.
  static I dot_words(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I add_twos(I words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
  // Words: sum + the products of unsigned bytes and signed ones, by twos, which saturate.
  static I dot_twos(I sum, I a, I b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
  // sum + the products of unsigned bytes and signed ones, by fours.
#if defined(__AVXVNNI__)
  static I dot_fours(I sum, I a, I b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX512VNNI__)  // the same instruction, for the tests of AVX-VNNI on a CPU that has only this
  static I dot_fours(I sum, I a, I b) { return _mm256_dpbusd_epi32(sum, a, b); }
#endif
  // Lanes of less than 16 bits as words: in each four 0 1 2 3 -> 0 2 1 3.
  static void store_words(void* p, I a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
  }
  // Lanes of less than 8 bits as bytes, in their order.
  static __m128i to_bytes(I a) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return _mm_packs_epi16(words, words);
  }
  static void store_bytes(void* p, __m128i bytes) { _mm_storel_epi64(static_cast<__m128i*>(p), bytes); }
  static int sum_bytes(__m128i bytes) {  // what adds them takes unsigned ones
    const __m128i unsigned_bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
    return _mm_cvtsi128_si32(_mm_sad_epu8(unsigned_bytes, _mm_setzero_si128())) - kWidth * 128;
  }
  template <int Four>
  static int four_of(__m128i bytes) {
    return _mm_extract_epi32(bytes, Four);
  }
};

}  // namespace
}  // namespace prunekern
