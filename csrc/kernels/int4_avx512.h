// What int4 products of AVX-512 have in common, whatever they multiply with: tiles of 6 rows by 2 vectors of
// 16 channels (12 integer and 12 fp32 sums, 2 vectors of codes, 1 broadcast, 1 mask: 28 of 32 registers).
#pragma once

#include "kernels/avx512.h"
#include "kernels/int4_tile.h"

namespace prunekern {
namespace {  // each file its own copy

struct Int4Avx512 : Int4Groups<6> {
  using V = Avx512;
  using Sum = __m512i;
  using Bytes = __m512i;

  static Bytes load(const char* p) { return _mm512_loadu_si512(p); }
  static Bytes low(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static Bytes high(Bytes codes) { return low(_mm512_srli_epi16(codes, 4)); }
  static Bytes x(const char* p) { return _mm512_set1_epi32(four_bytes(p)); }
  static int put(char* to, V::F q) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q));
    put_four(to, _mm_cvtsi128_si32(bytes));
    put_four(to + 4 * kRows, _mm_extract_epi32(bytes, 1));
    put_four(to + 8 * kRows, _mm_extract_epi32(bytes, 2));
    put_four(to + 12 * kRows, _mm_extract_epi32(bytes, 3));
    // The instruction adds unsigned bytes: 128 is added to each of the 16 before.
    const __m128i sums =
        _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
  }
};

}  // namespace
}  // namespace prunekern
