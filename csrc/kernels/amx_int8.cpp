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
    Avx512::store_int(acc, Avx512::add_int(Avx512::load_int(acc), Avx512::load_int(more)));
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
  static void put(char* to, V::F scaled, Sum&) { V::store_bytes(to, V::to_bytes(V::to_int(scaled))); }
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
