// AVX-512 (F, BW, VL, DQ): tiles of 14 rows by 2 vectors of 16.
#include <immintrin.h>

#include "tile.h"

namespace prunekern {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  using F = __m512;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_part(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
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
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F madd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F select_positive(F x, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), no, yes);
  }
};

}  // namespace

constexpr Kernels kAvx512Kernels = make_kernels<Avx512, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>();

}  // namespace prunekern
