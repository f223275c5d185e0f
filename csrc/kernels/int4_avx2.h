// What int4 products of 256 bits have in common, whatever they multiply with: tiles of 3 rows by 2 vectors of
// 8 channels (6 integer and 6 fp32 sums, 2 vectors of codes, 1 broadcast, 1 mask: 16 of 16 registers).
#pragma once

#include "kernels/avx2.h"
#include "kernels/int4_tile.h"

namespace prunekern {
namespace {  // each file its own copy

struct Int4Avx2 : Int4Groups<3> {
  using V = Avx2;
  using Sum = __m256i;
  using Bytes = __m256i;

  static Bytes load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bytes low(Bytes codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  static Bytes high(Bytes codes) { return low(_mm256_srli_epi16(codes, 4)); }
  static Bytes x(const char* p) { return _mm256_set1_epi32(four_bytes(p)); }
  static int put(char* to, V::F q) {
    const __m256i whole = _mm256_cvtps_epi32(q);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    put_four(to, _mm_cvtsi128_si32(bytes));
    put_four(to + 4 * kRows, _mm_extract_epi32(bytes, 1));
    // The instruction adds unsigned bytes: 128 is added to each of the 8 before.
    const __m128i sums =
        _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) - 8 * 128;
  }
};

}  // namespace
}  // namespace prunekern
