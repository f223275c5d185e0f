// What products on AMX tiles have in common but their instruction: the set-up of a thread, and tiles of 2 x 2
// (32 rows by 32 channels) or 1 x 2. D says which instruction multiplies a tile and how sums are added.
//
// One step of k is four products of 16 cycles each, and four loads of 1 KB: 64 cycles for 4 KB, where L1
// delivers 128 bytes a cycle and L2 about 48. All from L2 is 85 cycles; the panel is read by all row tiles of
// a block, so where 500 bytes of each row are multiplied half of it comes from L1. Any other shape of the
// four sums loads more.
//
// An epilogue of 32 x 32 sums takes about 1,000 cycles with gelu, 200 without, against 1,536 of products for
// 1,536 bytes of a row. Products leave the vector units idle, so each tile's epilogue runs, row by row,
// between the products of the next.
#pragma once

#include <immintrin.h>

#include "kernels/avx512.h"
#include "kernels/finish.h"

namespace prunekern {
namespace {  // each file its own copy

constexpr int kTileRows = 16, kTileBytes = 1024, kPanelWidth = 32;
constexpr std::int64_t kRowBytes = 64, kPairBytes = 128, kStepBytes = kTileRows * kPairBytes;

// Few rows do not go through tiles, reckoned for weights of which the last-level cache delivers 9 bytes a
// cycle, L2 about 48. bf16: 2 KB come in 220 cycles at best, 4 rows multiply them in 200 on the vector units,
// where x stays fp32. int8: vpdpbusd takes 16 cycles a row for 2 KB, so up to 13 rows wait for the last-level
// cache either way, and 4 rows take longer than a tile from L2 does.
constexpr std::int64_t kMinRows = 5;

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

// The steps of a panel, one after another. Where a weight ends within one: a copy of what there is, as
// nothing behind it may be read. x has zeros there, so what follows in the copy does not matter.
template <bool always_whole>
class PanelSteps {
 public:
  explicit PanelSteps(const ProductArgs& args) : at_(args.panel), left_(args.readable) {}
  const char* next() {
    const char* step = at_;
    if constexpr (!always_whole) {
      if (left_ < kStepBytes) {
        __builtin_memcpy(rest_, step, static_cast<std::size_t>(left_));
        barrier();
        return rest_;
      }
      left_ -= kStepBytes;
    }
    at_ += kStepBytes;
    return step;
  }

 private:
  const char* at_;
  std::int64_t left_;
  alignas(64) char rest_[always_whole ? 1 : kStepBytes];
};

template <class D>
void two_row_tiles(const ProductArgs& args) {
  const char* top = args.x;
  const char* bottom = args.x + args.row_tile_bytes;
  PanelSteps<D::kStepsAreWhole> steps(args);
  Shadow shadow(args);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    const char* panel = steps.next();
    _tile_loadd(4, top, kRowBytes);
    _tile_loadd(6, panel, kPairBytes);
    D::first();
    _tile_loadd(7, panel + kRowBytes, kPairBytes);
    D::second();
    _tile_loadd(5, bottom, kRowBytes);
    D::third();
    D::fourth();
    top += kTileBytes;
    bottom += kTileBytes;
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
template <class D>
void one_row_tile(const ProductArgs& args) {
  alignas(64) float odd[kTileRows * kPanelWidth];
  const char* a = args.x;
  PanelSteps<D::kStepsAreWhole> steps(args);
  Shadow shadow(args);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < args.k_steps; ++k) {
    const char* panel = steps.next();
    if (k % 2 == 0) {
      _tile_loadd(4, a, kRowBytes);
      _tile_loadd(6, panel, kPairBytes);
      D::first();
      _tile_loadd(7, panel + kRowBytes, kPairBytes);
      D::second();
    } else {
      _tile_loadd(5, a, kRowBytes);
      _tile_loadd(6, panel, kPairBytes);
      D::third();
      _tile_loadd(7, panel + kRowBytes, kPairBytes);
      D::fourth();
    }
    a += kTileBytes;
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
  for (int i = 0; i < kTileRows * kPanelWidth; i += 16) D::add(acc + i, odd + i);
}

template <class D>
void multiply(const ProductArgs& args) {
  barrier();
  args.row_tiles == 2 ? two_row_tiles<D>(args) : one_row_tile<D>(args);
}

void begin() { _tile_loadconfig(&kConfig); }
void end() { _tile_release(); }

// PeakFn: what is in tiles stays in them.
template <class D>
std::int64_t tiles_peak(std::int64_t steps) {
  alignas(64) char some[kTileBytes];
  for (int i = 0; i < kTileBytes; ++i) some[i] = static_cast<char>(i % 61);  // as bf16: under 0.2
  barrier();
  begin();
  _tile_loadd(4, some, kRowBytes);
  _tile_loadd(5, some, kRowBytes);
  _tile_loadd(6, some, kRowBytes);
  _tile_loadd(7, some, kRowBytes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    D::first();
    D::second();
    D::third();
    D::fourth();
  }
  end();
  return steps * 4 * kTileRows * (kPanelWidth / 2) * D::kStepInputs * 2;
}

// A row of the table but its weights, its arithmetic and how x is prepared.
template <class D>
constexpr Product make_tiles_product() {
  Product row{};
  row.least_rows[0] = row.least_rows[1] = kMinRows;
  row.most_rows = kAlways;
  row.tile_rows = kTileRows;
  row.row_tiles = 2;
  row.step_inputs = D::kStepInputs;
  row.step_bytes = kTileBytes;
  row.panel_step_bytes = kStepBytes;
  row.begin = begin;
  row.end = end;
  row.multiply = multiply<D>;
  fill_finishes<Avx512, typename D::Sums, float>(row.finish[0]);
  fill_finishes<Avx512, typename D::Sums, std::uint16_t>(row.finish[1]);
  row.peak = tiles_peak<D>;
  return row;
}

}  // namespace
}  // namespace prunekern
