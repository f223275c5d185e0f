// AMX, bf16 (with AVX-512 and its bf16 conversions).
#include "kernels/amx.h"

#include "kernels/amx_tiles.h"

namespace prunekern {
namespace {

constexpr int kTileInputs = 32;

const Window kPlain[2] = {{0, 0, 16, 0xffff}, {16, 16, 16, 0xffff}};

struct Bf16Tiles {
  using Sums = FloatSums<Avx512>;
  static constexpr int kStepInputs = kTileInputs;
  static constexpr bool kStepsAreWhole = true;  // bf16 panels have room for a multiple of 32 inputs

  static void first() { _tile_dpbf16ps(0, 4, 6); }
  static void second() { _tile_dpbf16ps(1, 4, 7); }
  static void third() { _tile_dpbf16ps(2, 5, 6); }
  static void fourth() { _tile_dpbf16ps(3, 5, 7); }
  static void add(float* acc, const float* more) {
    Avx512::store(acc, Avx512::add(Avx512::load(acc), Avx512::load(more)));
  }
};

// 32 inputs of one row, rounded to nearest even; `inputs` of them exist.
inline __m512i take(const float* x, std::int64_t inputs) {
  const __m512 low = inputs >= 16 ? _mm512_loadu_ps(x) : Avx512::load_part(x, static_cast<int>(inputs));
  const __m512 high = inputs >= 32   ? _mm512_loadu_ps(x + 16)
                      : inputs <= 16 ? _mm512_setzero_ps()
                                     : Avx512::load_part(x + 16, static_cast<int>(inputs - 16));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}
inline __m512i take(const std::uint16_t* x, std::int64_t inputs) {
  const __mmask32 there = inputs >= 32 ? 0xffffffffu : (1u << inputs) - 1;
  return _mm512_maskz_loadu_epi16(there, x);
}

template <class T>
void prepare(const PrepareArgs& args) {
  const std::int64_t k_steps = (args.k + kTileInputs - 1) / kTileInputs;
  const std::int64_t padded = (args.rows + kTileRows - 1) / kTileRows * kTileRows;
  for (std::int64_t r = 0; r < padded; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * args.x_stride;
    char* to = args.to + r / kTileRows * k_steps * kTileBytes + r % kTileRows * kRowBytes;
    for (std::int64_t k = 0; k < args.k; k += kTileInputs, to += kTileBytes)
      _mm512_storeu_si512(to, r < args.rows ? take(x + k, args.k - k) : _mm512_setzero_si512());
  }
}

// A panel of 32 outputs is one step of the next layer.
void place(char* tile, std::int64_t, std::int64_t panel, EpilogueArgs& args) {
  args.windows = kPlain;
  args.n_windows = 2;
  args.y = tile + panel * kTileBytes;
  args.y_stride = kTileInputs;
}

constexpr Product make_product() {
  Product row = make_tiles_product<Bf16Tiles>();
  row.weights = WeightType::bf16;
  row.arithmetic = Arithmetic::bf16;
  row.prepare[0] = prepare<float>;
  row.prepare[1] = prepare<std::uint16_t>;
  row.place = place;
  row.between = Element::bf16;
  return row;
}

}  // namespace

constexpr Product kAmxBf16 = make_product();

}  // namespace prunekern
