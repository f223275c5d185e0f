// AMX, int8 (with AVX-512): signed by signed, so that weights need no offset as vpdpbusd's do.
#include "kernels/amx.h"
#include "kernels/amx_tiles.h"
#include "kernels/quantize.h"

namespace prunekern {
namespace {

struct Int8Tiles {
  using Sums = RowScaledSums<Avx512>;
  static constexpr int kStepInputs = 64;
  static constexpr bool kStepsAreWhole = false;  // int8 panels have room for a multiple of 16 inputs

  static void first() { _tile_dpbssd(0, 4, 6); }
  static void second() { _tile_dpbssd(1, 4, 7); }
  static void third() { _tile_dpbssd(2, 5, 6); }
  static void fourth() { _tile_dpbssd(3, 5, 7); }
  static void add(float* acc, const float* more) {
    _mm512_storeu_si512(acc, _mm512_add_epi32(_mm512_loadu_si512(acc), _mm512_loadu_si512(more)));
  }
};

// Rows of 64 int8, as quantize.h lays them out: a tile of 16 rows is one step. What stands in the rows that
// are missing from the last tile does not matter: each row of sums is made of one row of x.
struct Int8Rows {
  using V = Avx512;
  static constexpr int kRows = kTileRows, kGroups = 16, kGroupInputs = 4, kGroupBytes = 4;
  static constexpr int kUnsignedOffset = 0, kTailBytes = sizeof(RowTail<kTileRows>);

  struct Sum {};  // sums begin at zero, whatever those of x are
  static Sum zero() { return {}; }
  static std::int32_t sum(Sum) { return 0; }
  static void put(char* to, V::F scaled, Sum&) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
  }
};

template <class T>
void prepare(const PrepareArgs& args) {
  quantize_rows<Int8Rows, T>(args);
}

constexpr Product make_product() {
  Product row = make_tiles_product<Int8Tiles>();
  row.weights = WeightType::int8;
  row.arithmetic = Arithmetic::int8;
  row.tail_bytes = Int8Rows::kTailBytes;
  row.prepare[0] = prepare<float>;
  row.prepare[1] = prepare<std::uint16_t>;
  return row;
}

}  // namespace

constexpr Product kAmxInt8 = make_product();

}  // namespace prunekern
