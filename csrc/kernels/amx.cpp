// AMX (with AVX-512 and its bf16 conversions): tiles of 2 x 2, that is 32 rows by 32 channels.
//
// One step of k is four products of 16 cycles each, and four loads of 1 KB: 64 cycles for 4 KB, where L1
// delivers 128 bytes a cycle and L2 about 48. All from L2 is 85 cycles; the panel is read by all row tiles of
// a block, so up to K of about 500 half of it comes from L1. Any other shape of the four sums loads more.
//
// An epilogue of 32 x 32 sums takes about 1,000 cycles with gelu, 200 without, against 1,536 of products at
// K = 768. Products leave the vector units idle, so each tile's epilogue runs, row by row, between the
// products of the next.
#include "kernels/amx.h"

#include <immintrin.h>

#include "kernels/avx512.h"
#include "kernels/finish.h"

namespace prunekern {
namespace {

constexpr int kTileRows = 16, kTileInputs = 32, kTileBytes = 1024, kPanelWidth = 32;

// Few rows do not go through tiles: they wait for weights either way (2 KB of them come from the last-level
// cache in about 220 cycles, 4 rows multiply them in 200 on the vector units), and there x stays fp32.
constexpr std::int64_t kMinRows = 5;

const Window kPlain[2] = {{0, 0, 16, 0xffff}, {16, 16, 16, 0xffff}};

// Constant from the start: gcc 12 tells the compiler of 8 of the 64 bytes that ldtilecfg reads, and drops
// stores to the others. Palette 1 is the same on every CPU with AMX, so nobody asks cpuid's leaf 0x1D.
struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
alignas(64) const TileConfig kConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The tile intrinsics of gcc 12 do not say that they read memory.
inline void barrier() { __asm__ volatile("" ::: "memory"); }

// What happens between the products: at every step of k some rows of the tiles before, some lines of the
// weights to come, some rows of y.
class Shadow {
 public:
  explicit Shadow(const ProductArgs& args)
      : args_(args), weights_(args.next_weights), y_(args.y), residual_(args.residual) {
    const std::int64_t steps = args.k_steps > 0 ? args.k_steps : 1;
    std::int64_t rows = 0;
    for (std::int64_t i = 0; i < args.n_before; ++i) rows += args.before[i].args.rows + kAhead;
    rows_ = (rows + steps - 1) / steps;
    y_rows_ = args.row_lines > 0 ? (args.rows + steps - 1) / steps : 0;
  }
  void step() {
    for (std::int64_t i = 0; i < args_.next_lines; ++i, weights_ += kLineBytes)
      __builtin_prefetch(weights_, 0, 2);
    for (std::int64_t r = 0; r < y_rows_ && y_done_ < args_.rows; ++r, ++y_done_) prefetch_row();
    if (at_ == args_.n_before) return;
    Finish& one = args_.before[at_];
    args_.finish(one, rows_);
    if (one.written == one.args.rows) ++at_;
  }
  void complete() {
    for (; at_ < args_.n_before; ++at_) args_.finish(args_.before[at_], kTileRows + kAhead);
  }

 private:
  static constexpr int kLineBytes = 64;

  // A store that misses waits for its line, and the stores behind it wait too.
  void prefetch_row() {
    for (std::int64_t i = 0; i < args_.row_lines; ++i) __builtin_prefetch(y_ + i * kLineBytes, 1, 3);
    y_ += args_.y_step;
    if (residual_ == nullptr) return;
    for (std::int64_t i = 0; i < args_.row_lines; ++i) __builtin_prefetch(residual_ + i * kLineBytes, 0, 3);
    residual_ += args_.residual_step;
  }

  const ProductArgs& args_;
  const char *weights_, *y_, *residual_;
  std::int64_t at_ = 0, rows_, y_rows_, y_done_ = 0;
};

constexpr std::int64_t kRowBytes = 64, kPairBytes = 128, kStepBytes = kTileRows * kPairBytes;

void two_row_tiles(const ProductArgs& args) {
  const char* top = args.x;
  const char* bottom = args.x + args.row_tile_bytes;
  const char* panel = args.panel;
  Shadow shadow(args);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    _tile_loadd(4, top, kRowBytes);
    _tile_loadd(6, panel, kPairBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + kRowBytes, kPairBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, bottom, kRowBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    top += kTileBytes;
    bottom += kTileBytes;
    panel += kStepBytes;
    shadow.step();
  }
  shadow.complete();
  barrier();
  float* acc = args.acc;
  _tile_stored(0, acc, kPairBytes);
  _tile_stored(1, acc + 16, kPairBytes);
  _tile_stored(2, acc + kTileRows * kPanelWidth, kPairBytes);
  _tile_stored(3, acc + kTileRows * kPanelWidth + 16, kPairBytes);
  barrier();
}

// Even and odd steps of k have sums of their own: a product takes 52 cycles until the next may add to it, and
// two sums in turn would leave half of them idle.
void one_row_tile(const ProductArgs& args) {
  alignas(64) float odd[kTileRows * kPanelWidth];
  const char* a = args.x;
  const char* panel = args.panel;
  Shadow shadow(args);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    if (k % 2 == 0) {
      _tile_loadd(4, a, kRowBytes);
      _tile_loadd(6, panel, kPairBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + kRowBytes, kPairBytes);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_loadd(5, a, kRowBytes);
      _tile_loadd(6, panel, kPairBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, panel + kRowBytes, kPairBytes);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += kTileBytes;
    panel += kStepBytes;
    shadow.step();
  }
  shadow.complete();
  barrier();
  float* acc = args.acc;
  _tile_stored(0, acc, kPairBytes);
  _tile_stored(1, acc + 16, kPairBytes);
  _tile_stored(2, odd, kPairBytes);
  _tile_stored(3, odd + 16, kPairBytes);
  barrier();
  for (int i = 0; i < kTileRows * kPanelWidth; i += 16)
    Avx512::store(acc + i, Avx512::add(Avx512::load(acc + i), Avx512::load(odd + i)));
}

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

void begin() { _tile_loadconfig(&kConfig); }
void end() { _tile_release(); }

void multiply(const ProductArgs& args) {
  barrier();
  args.row_tiles == 2 ? two_row_tiles(args) : one_row_tile(args);
}

constexpr Product make_product() {
  Product row{};
  row.weights = WeightType::bf16;
  row.arithmetic = Arithmetic::bf16;
  row.least_rows[0] = row.least_rows[1] = kMinRows;
  row.most_rows = kAlways;
  row.tile_rows = kTileRows;
  row.row_tiles = 2;
  row.step_inputs = kTileInputs;
  row.step_bytes = kTileBytes;
  row.panel_step_bytes = kStepBytes;
  row.begin = begin;
  row.end = end;
  row.prepare[0] = prepare<float>;
  row.prepare[1] = prepare<std::uint16_t>;
  row.multiply = multiply;
  fill_finishes<Avx512, FloatSums<Avx512>, float>(row.finish[0]);
  fill_finishes<Avx512, FloatSums<Avx512>, std::uint16_t>(row.finish[1]);
  row.place = place;
  row.between = Element::bf16;
  return row;
}

}  // namespace

constexpr Product kAmxBf16 = make_product();

}  // namespace prunekern
