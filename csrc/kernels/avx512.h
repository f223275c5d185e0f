// AVX-512 (F, BW, VL, DQ): the vector type of the files that are compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace prunekern {
namespace {  // each file its own copy

struct Avx512 {
  static constexpr int kWidth = 16;
  using F = __m512;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
  // This input of the four that each channel of an int8 panel has side by side.
  template <int Input>
  static F load_one_of_four(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_srai_epi32(_mm512_slli_epi32(_mm512_loadu_si512(p), 24 - 8 * Input), 24));
  }
  // Lanes of eight codes of four bits: the one at this bit of each.
  template <int Shift>
  static F load_code(const char* p) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(p), Shift);
    return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)));
  }
  static F load_half(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Sums in int32.
  static F load_sums(const float* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

  // bf16: the upper half of a float.
  static F from_bf16(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static __m256i to_bf16(F a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);  // rounding could make it infinite
    const __m512i kept = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  static F load(const std::uint16_t* p) {
    return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_part(const std::uint16_t* p, int n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static void store(std::uint16_t* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
  static void store_part(std::uint16_t* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
  static F load_even(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static F load_odd(const std::uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static F compress(F a, std::uint32_t mask) {
    return _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), a);
  }
  static F expand(const float* p, std::uint32_t mask) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), load(p));
  }
  // a0 b0 a1 b1 ... of the lower halves; of the upper halves.
  static F zip_low(F a, F b) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, order, b);
  }
  static F zip_high(F a, F b) {
    const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, order, b);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F negative(F a) { return _mm512_xor_ps(a, set(-0.0f)); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
  // max(a, |b|) of the bits, a not negative; and the largest lane of those.
  static F max_size_bits(F a, F b) {
    return _mm512_castsi512_ps(
        _mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(_mm512_abs_ps(b))));
  }
  static std::uint32_t largest_bits(F a) { return _mm512_reduce_max_epu32(_mm512_castps_si512(a)); }
  static F mix(F a, F b) { return _mm512_xor_ps(a, b); }
  static F select_positive(F x, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), no, yes);
  }

  // Integers: lanes of 32 bits, seen as two words or four bytes where a name says so.
  using I = __m512i;
  static I set_int(int x) { return _mm512_set1_epi32(x); }
  static I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static void store_int(void* p, I a) { _mm512_storeu_si512(p, a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); }  // nearest even
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static int sum_int(I a) { return _mm512_reduce_add_epi32(a); }
  // Bytes 0 and 2 of every lane as words, with their sign; 1 and 3.
  static I even_bytes(I a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
  static I odd_bytes(I a) { return _mm512_srai_epi16(a, 8); }
  // The lower four bits of every byte; the upper.
  static I low_codes(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
  static I high_codes(I a) { return low_codes(_mm512_srli_epi16(a, 4)); }
  static I add_128_to_bytes(I a) {  // from signed to unsigned
    return _mm512_xor_si512(a, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  // sum + the products of words, by twos.
  static I dot_words(I sum, I a, I b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
  static I add_twos(I words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }
  // Words: sum + the products of unsigned bytes and signed ones, by twos, which saturate.
  static I dot_twos(I sum, I a, I b) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b)); }
#ifdef __AVX512VNNI__
  // sum + the products of unsigned bytes and signed ones, by fours.
  static I dot_fours(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
#endif
  // Lanes of less than 16 bits as words: in each four 0 1 2 3 -> 0 2 1 3.
  static void store_words(void* p, I a) {
    const __m256i words = _mm512_cvtepi32_epi16(a);
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  }
  // Lanes of less than 8 bits as bytes, in their order.
  static __m128i to_bytes(I a) { return _mm512_cvtepi32_epi8(a); }
  static void store_bytes(void* p, __m128i bytes) { _mm_storeu_si128(static_cast<__m128i*>(p), bytes); }
  static int sum_bytes(__m128i bytes) {  // what adds them takes unsigned ones
    const __m128i unsigned_bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
    const __m128i sums = _mm_sad_epu8(unsigned_bytes, _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - kWidth * 128;
  }
  template <int Four>
  static int four_of(__m128i bytes) {
    return _mm_extract_epi32(bytes, Four);
  }
};

}  // namespace
}  // namespace prunekern
