// AVX-512 BF16: vdpbf16ps, tiles of 14 rows by 2 vectors of 16 channels. Sums are fp32, a product of two
// inputs is added at once; denormals count as zero.
#include "kernels/avx512.h"
#include "kernels/dot.h"
#include "kernels/products.h"

namespace prunekern {
namespace {

// groups: of a step, two inputs each.
template <int groups>
struct Bf16Pairs {
  using V = Avx512;
  using Sum = __m512;
  using Weights = __m512bh;
  using X = __m512bh;
  static constexpr int kRows = 14, kGroups = groups, kGroupInputs = 2, kGroupBytes = 4, kTailBytes = 0;
  static constexpr bool kHasPeak = true;

  static Weights weights(const char* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static X x(const char* p) {
    int pair;
    __builtin_memcpy(&pair, p, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static Sum dot(Sum acc, Weights weights, X x) { return _mm512_dpbf16_ps(acc, weights, x); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum start(const char*, int) { return zero(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static void store(float* p, Sum a) { _mm512_storeu_ps(p, a); }

  // A step of one row, rounded to nearest even; `inputs` of them exist.
  static void take(const float* x, std::int64_t inputs, char* to) {
    if constexpr (groups == 16) {
      const __m512 low = inputs >= 16 ? _mm512_loadu_ps(x) : Avx512::load_part(x, static_cast<int>(inputs));
      const __m512 high = inputs >= 32   ? _mm512_loadu_ps(x + 16)
                          : inputs <= 16 ? _mm512_setzero_ps()
                                         : Avx512::load_part(x + 16, static_cast<int>(inputs - 16));
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    } else {
      const __m256 all = inputs >= 8 ? _mm256_loadu_ps(x)
                                     : _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << inputs) - 1), x);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(all)));
    }
  }
  static void take(const std::uint16_t* x, std::int64_t inputs, char* to) {
    const __mmask32 there = inputs >= 2 * groups ? (1ull << 2 * groups) - 1 : (1u << inputs) - 1;
    if constexpr (groups == 16)
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, x));
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm_maskz_loadu_epi16(static_cast<__mmask8>(there), x));
  }

  // Four steps of one row at once; a step by itself converts 8 inputs at the price of 32.
  static void take_four(const float* x, char* to, std::int64_t step_bytes) {
    const __m512i all =
        reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)));
    auto store = [&](int step, __m128i part) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + step * step_bytes), part);
    };
    store(0, _mm512_castsi512_si128(all));
    store(1, _mm512_extracti32x4_epi32(all, 1));
    store(2, _mm512_extracti32x4_epi32(all, 2));
    store(3, _mm512_extracti32x4_epi32(all, 3));
  }

  template <class T>
  static void prepare(const PrepareArgs& args) {
    constexpr std::int64_t kInputs = kGroups * kGroupInputs, kRowBytes = kGroups * kGroupBytes;
    const std::int64_t tile_bytes = (args.k + kInputs - 1) / kInputs * kRows * kRowBytes;
    for (std::int64_t r = 0; r < args.rows; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
      char* to = args.to + r / kRows * tile_bytes + r % kRows * kRowBytes;
      std::int64_t k = 0;
      if constexpr (groups == 4 && sizeof(T) == 4)
        for (; k + 4 * kInputs <= args.k; k += 4 * kInputs, to += 4 * kRows * kRowBytes)
          take_four(x + k, to, kRows * kRowBytes);
      for (; k < args.k; k += kInputs, to += kRows * kRowBytes) take(x + k, args.k - k, to);
    }
  }

  // Inputs k and k + 1 side by side; zeros after the last.
  static void pair_up(const float* from, std::int64_t panels, std::int64_t k, char* to) {
    constexpr std::int64_t kInputs = kGroups * kGroupInputs;
    const std::int64_t pairs = (k + kInputs - 1) / kInputs * kGroups;
    for (std::int64_t p = 0; p < panels; ++p, from += k * 32)
      for (std::int64_t i = 0; i < pairs; ++i, to += 128)
        for (int c = 0; c < 32; c += 16) {
          const float* at = from + 2 * i * 32 + c;
          const __m512 even = 2 * i < k ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
          const __m512 odd = 2 * i + 1 < k ? _mm512_loadu_ps(at + 32) : _mm512_setzero_ps();
          const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
          const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
          _mm512_storeu_si512(to + 4 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
  }
};

using Layers = Bf16Pairs<16>;
// Heads have few channels: steps of 8 inputs pad them less.
using Heads = Bf16Pairs<4>;

const Window kPlain[2] = {{0, 0, 16, 0xffff}, {16, 16, 16, 0xffff}};

// A panel of 32 outputs is one step of the next layer.
void place(char* tile, std::int64_t, std::int64_t panel, EpilogueArgs& args) {
  args.windows = kPlain;
  args.n_windows = 2;
  args.y = tile + panel * Layers::kRows * Layers::kGroups * Layers::kGroupBytes;
  args.y_stride = Layers::kGroups * Layers::kGroupInputs;
}

// One row or two wait for weights either way, and there x stays fp32: of 768 x 3072 weights, one row is
// multiplied at 49 GFLOP/s here and at 55 where weights are widened, two at 90 and 89, three at 118 and 96
// (EPYC).
constexpr std::int64_t kLeastRows = 3;

constexpr Product make_layers() {
  Product row = make_dot_product<Layers, FloatSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(
      WeightType::bf16, Arithmetic::bf16, kLeastRows, kAlways);
  row.place = place;
  row.between = Element::bf16;
  return row;
}

constexpr Product make_heads() {
  Product row = make_dot_product<Heads, FloatSums<Avx512>, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>(
      WeightType::bf16, Arithmetic::bf16, 1, kAlways);
  row.pair_up = Heads::pair_up;
  return row;
}

}  // namespace

constexpr Product kAvx512Bf16 = make_layers(), kAvx512Bf16Heads = make_heads();

}  // namespace prunekern
