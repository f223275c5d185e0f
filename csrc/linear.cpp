// The loops around the microkernels: row blocks, panels, tiles, threads. Knows no instruction set.
//
// What to expect of one core at about 165 GFLOP/s (fp32 FMA) and 24 GB/s from the last-level cache:
// - Every row block streams all of the weights: 4 bytes of weight make 2 flops a row, so up to
//   165 / (2 * 24 / 4) = 14 rows the bytes bind (at 1 row: 12 GFLOP/s), beyond it the FMAs.
// - At 16 rows the two times are equal and only overlap hides one of them: weights are prefetched a panel
//   ahead, spread over the tiles of the panel before.
// - A block of 128 rows re-reads weights at 165 / (2 * 128) * 4 = 2.6 GB/s: out of the way.
#include "prunekern/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "blocks.h"
#include "kernels/kernel.h"
#include "parallel.h"
#include "plan.h"

namespace prunekern {
namespace {

constexpr std::int64_t kMaxBlockRows = 140;  // ten full AVX-512 tiles
constexpr std::int64_t kMaxRowLines = 8;     // of y, prefetched for a row: a panel and its gaps, seldom more
constexpr std::int64_t kStreamAhead = 8192;  // bytes prefetched ahead where a panel has one tile only

// Rows of x that stay in half of L2 while the weights stream through the other half.
std::int64_t block_rows(std::int64_t k, std::int64_t tile_rows) {
  const std::int64_t fit = l2_bytes() / 2 / (4 * std::max<std::int64_t>(k, 1));
  return std::clamp(fit, 2 * tile_rows, kMaxBlockRows);
}

// The rows of one block as the tiles read them: x itself, or a copy where it must be gathered, or where the
// rows of a tile would fall into one set of the L1 cache (a stride of whole pages: 14 rows do not fit 12
// ways).
struct Block {
  const float* data;
  std::int64_t stride;
};

Block take_block(const LinearCall& call, Range rows, Scratch& scratch) {
  const float* x = static_cast<const float*>(call.x) + rows.begin * call.x_stride;
  const bool aliased = call.x_stride * 4 % 4096 == 0 && rows.size() > 4;
  if (call.in_index == nullptr && !aliased) return {x, call.x_stride};
  const std::int64_t stride = (call.weight.k + 15) / 32 * 32 + 16;  // an odd number of lines
  float* copy = scratch.get<float>(rows.size() * stride);
  for (std::int64_t r = 0; r < rows.size(); ++r) {
    const float* from = x + r * call.x_stride;
    float* to = copy + r * stride;
    if (call.in_index == nullptr) {
      std::memcpy(to, from, static_cast<std::size_t>(call.weight.k) * 4);
    } else {
      for (std::int64_t i = 0; i < call.weight.k; ++i) to[i] = from[call.in_index[i]];
    }
  }
  return {copy, stride};
}

// One thread's share: rows x panels of the result.
void run(const LinearCall& call, const Kernels& kernels, const Windows& windows, Range rows, Range panels) {
  static thread_local Scratch scratch;
  alignas(64) float acc[kMaxRows * kMaxWidth + kMaxWidth] = {};
  alignas(64) float bias[kMaxWidth];
  const std::int64_t width = kernels.width, panel_floats = width * call.weight.k;
  const float* packed = static_cast<const float*>(call.weight.data);
  const std::int64_t step_lines = 4 * width * 4 / kLine;  // lines of weights in 4 steps of k
  const EpilogueFn epilogue = kernels.epilogue[static_cast<int>(call.activation)];
  const std::int64_t blocks = ceil_div(rows.size(), block_rows(call.weight.k, kernels.rows));
  for (std::int64_t b = 0; b < blocks; ++b) {
    Range block_range = share(rows.size(), b, blocks);
    block_range = {rows.begin + block_range.begin, rows.begin + block_range.end};
    const Block block = take_block(call, block_range, scratch);
    const std::int64_t tiles = ceil_div(block_range.size(), kernels.rows);
    for (std::int64_t p = panels.begin; p < panels.end; ++p) {
      const std::int64_t channels = std::min(width, call.weight.n - p * width);
      std::fill(bias, bias + width, 0.0f);
      if (call.weight.bias != nullptr) std::copy_n(call.weight.bias + p * width, channels, bias);
      const Window* window = windows.all.data() + windows.first[p];
      const std::int64_t n_windows = windows.first[p + 1] - windows.first[p];
      const std::int64_t columns_end = window[n_windows - 1].column + window[n_windows - 1].width;
      const TileFn* tile_fns = channels * 2 > width ? kernels.tile : kernels.half_tile;

      // The weights after these: the next panel, or the first one again for the next block.
      const float* panel = packed + p * panel_floats;
      const float* next = p + 1 < panels.end ? panel + panel_floats
                          : b + 1 < blocks   ? packed + panels.begin * panel_floats
                                             : nullptr;
      for (std::int64_t t = 0; t < tiles; ++t) {
        const Range tile = share(block_range.size(), t, tiles);  // 16 rows: 8 + 8, not 14 + 2
        const std::int64_t row = block_range.begin + tile.begin;
        float* y = static_cast<float*>(call.y) + row * call.y_stride;
        const float* residual = call.residual == nullptr
                                    ? nullptr
                                    : static_cast<const float*>(call.residual) + row * call.residual_stride;

        TileArgs args{};
        args.a = block.data + tile.begin * block.stride;
        args.a_stride = block.stride;
        args.panel = panel;
        args.k = call.weight.k;
        args.acc = acc;
        // A store that misses waits for its line: 3 to 8 % of the whole where y is larger than L2.
        args.y = y + window->column;
        args.y_stride = call.y_stride;
        args.residual = residual == nullptr ? nullptr : residual + window->column;
        args.residual_stride = call.residual_stride;
        args.row_lines = std::min(ceil_div(columns_end - window->column, kLine / 4) + 1, kMaxRowLines);
        if (tiles == 1) {
          args.next_weights = panel + kStreamAhead / 4;
          args.next_lines = step_lines;
        } else if (next != nullptr) {
          args.next_weights = next + share(panel_floats, t, tiles).begin;
          args.next_lines = ceil_div(step_lines, tiles);
        }
        tile_fns[tile.size()](args);
        epilogue(
            {acc, tile.size(), bias, window, n_windows, residual, call.residual_stride, y, call.y_stride});
      }
    }
  }
}

// No output channel is left: nothing but the residual.
void fill(const LinearCall& call) {
  for (std::int64_t r = 0; r < call.m; ++r) {
    float* y = static_cast<float*>(call.y) + r * call.y_stride;
    if (call.residual == nullptr)
      std::fill_n(y, call.n_out, 0.0f);
    else
      std::memmove(y, static_cast<const float*>(call.residual) + r * call.residual_stride,
                   static_cast<std::size_t>(call.n_out) * 4);
  }
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("compact_linear: " + message);
}

void check(const LinearCall& call) {
  require(call.m >= 0 && call.in_features >= 0 && call.weight.k >= 0 && call.weight.n >= 0 && call.n_out >= 0,
          "sizes must not be negative");
  require(call.in_index != nullptr || call.weight.k == call.in_features || call.weight.k == 0,
          "the weight reads " + std::to_string(call.weight.k) + " inputs, x has " +
              std::to_string(call.in_features));
  require(call.out_index != nullptr || call.weight.n == call.n_out || call.weight.n == 0,
          "the weight makes " + std::to_string(call.weight.n) + " outputs, n_out is " +
              std::to_string(call.n_out));
  require(call.x_stride >= 0 && call.residual_stride >= 0 && call.y_stride >= call.n_out, "bad row stride");
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
  if (call.in_index != nullptr) check_index("in_index", call.in_index, call.weight.k, call.in_features);
  if (call.out_index != nullptr) check_index("out_index", call.out_index, call.weight.n, call.n_out);
}

}  // namespace

void compact_linear(Isa isa, const LinearCall& call) {
  const Kernels& kernel = kernels(isa);
  check(call);
  if (call.m == 0 || call.n_out == 0) return;
  if (call.weight.n == 0) return fill(call);
  static thread_local Windows kept_windows;
  Windows& windows = kept_windows;
  plan_windows(kernel, call.out_index, call.weight.n, call.n_out, windows);
  const std::int64_t panels = ceil_div(call.weight.n, kernel.width);
  // Rows or panels, whichever leaves the fullest thread less to do; at a tie rows, which share nothing.
  const std::int64_t row_tiles = ceil_div(call.m, kernel.rows);
  const std::int64_t by_rows = ceil_div(row_tiles, call.threads) * panels;
  const std::int64_t by_panels = ceil_div(panels, call.threads) * row_tiles;
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, std::max(row_tiles, panels)));
  parallel(threads, [&](int i, int count) {
    if (by_rows <= by_panels)
      run(call, kernel, windows, share(call.m, i, count), {0, panels});
    else
      run(call, kernel, windows, {0, call.m}, share(panels, i, count));
  });
}

}  // namespace prunekern
