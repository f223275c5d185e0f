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

#include "amx_linear.h"
#include "blocks.h"
#include "kernels/kernel.h"
#include "packed.h"
#include "parallel.h"
#include "plan.h"
#include "rows.h"

namespace prunekern {
namespace {

constexpr std::int64_t kMaxBlockRows = 140;      // ten full AVX-512 tiles
constexpr std::int64_t kChunkBytes = 24 * 1024;  // of a panel in fp32: half of L1, the rows get the rest
constexpr std::int64_t kMaxRowLines = 8;     // of y, prefetched for a row: a panel and its gaps, seldom more
constexpr std::int64_t kStreamAhead = 8192;  // bytes prefetched ahead where a panel has one tile only

// Rows of x that stay in half of L2 while the weights stream through the other half.
std::int64_t block_rows(std::int64_t k, std::int64_t tile_rows) {
  const std::int64_t fit = l2_bytes() / 2 / (4 * std::max<std::int64_t>(k, 1));
  return std::clamp(fit, 2 * tile_rows, kMaxBlockRows);
}

// k in parts whose weights stay in L1 while the tiles of a block take turns with them; whole where there is
// one tile and nothing to widen.
struct Chunks {
  std::int64_t k, size, count;

  Chunks(std::int64_t k, std::int64_t tiles, bool widened, std::int64_t width) : k(k), size(k), count(1) {
    const std::int64_t most = kChunkBytes / (4 * width);
    if (k <= most || (tiles == 1 && !widened)) return;
    size = round_up(ceil_div(k, ceil_div(k, most)), 4);  // the tile's unrolling, and bf16's pairs
    count = ceil_div(k, size);
  }
  Range operator[](std::int64_t i) const { return {i * size, std::min((i + 1) * size, k)}; }
};

// Memory of one thread, kept between calls.
struct Workspace {
  Scratch rows, sums, weights;
};

// Output channels first .. first + count of the weight, as an epilogue wants them.
struct Channels {
  alignas(64) float scale[kMaxWidth], bias[kMaxWidth];

  void load(const Packed& weight, std::int64_t first, std::int64_t count) {
    std::fill_n(scale, kMaxWidth, 1.0f);
    std::fill_n(bias, kMaxWidth, 0.0f);
    if (weight.type == WeightType::int8) std::copy_n(weight.scale + first, count, scale);
    if (weight.bias != nullptr) std::copy_n(weight.bias + first, count, bias);
  }
};

// One thread's share: rows x panels of the result.
void run(const LinearCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads,
         Range rows, Range panels) {
  static thread_local Workspace workspace;
  const Packed& weight = call.weight;
  const std::int64_t width = kernels.width;
  const std::int64_t row_bytes = width * value_bytes(weight.type);  // of a panel
  const std::int64_t panel_bytes = row_bytes * padded_k(weight.type, weight.k);
  const std::int64_t element = element_bytes(call.element);
  const char* packed = static_cast<const char*>(weight.data);
  const WidenFn widen = kernels.widen[static_cast<int>(weight.type)];
  const EpilogueFn epilogue =
      kernels.epilogue[static_cast<int>(call.element)][static_cast<int>(call.activation)];
  Channels channels;
  const std::int64_t blocks = ceil_div(rows.size(), block_rows(weight.k, kernels.rows));
  for (std::int64_t b = 0; b < blocks; ++b) {
    Range block = share(rows.size(), b, blocks);
    block = {rows.begin + block.begin, rows.begin + block.end};
    const Rows x = take_rows(call, kernels, reads, block, workspace.rows);
    float* sums = workspace.sums.get<float>(block.size() * width + kernels.vector);
    const std::int64_t tiles = ceil_div(block.size(), kernels.rows);
    const Chunks chunks(weight.k, tiles, widen != nullptr, width);
    for (std::int64_t p = panels.begin; p < panels.end; ++p) {
      const std::int64_t n_channels = std::min(width, weight.n - p * width);
      channels.load(weight, p * width, n_channels);
      const Window* window = windows.all.data() + windows.first[p];
      const std::int64_t n_windows = windows.first[p + 1] - windows.first[p];
      const std::int64_t columns_end = window[n_windows - 1].column + window[n_windows - 1].width;
      const TileFn* tile_fns = n_channels * 2 > width ? kernels.tile : kernels.half_tile;

      for (std::int64_t c = 0; c < chunks.count; ++c) {
        const Range chunk = chunks[c];
        const bool is_last = c + 1 == chunks.count;
        const char* stored = packed + p * panel_bytes + chunk.begin * row_bytes;
        const float* multiplied = reinterpret_cast<const float*>(stored);
        if (widen != nullptr) {
          float* widened = workspace.weights.get<float>(round_up(chunks.size, 2) * width);
          widen({stored, chunk.size(), widened});
          multiplied = widened;
        }
        // The weights after these: the next ones, or the first again for the next block.
        const char* next = !is_last             ? stored + chunk.size() * row_bytes
                           : p + 1 < panels.end ? packed + (p + 1) * panel_bytes
                           : b + 1 < blocks     ? packed + panels.begin * panel_bytes
                                                : nullptr;
        for (std::int64_t t = 0; t < tiles; ++t) {
          const Range tile = share(block.size(), t, tiles);  // 16 rows: 8 + 8, not 14 + 2
          const std::int64_t row = block.begin + tile.begin;
          char* y = static_cast<char*>(call.y) + row * call.y_stride * element;
          const char* residual = call.residual == nullptr ? nullptr
                                                          : static_cast<const char*>(call.residual) +
                                                                row * call.residual_stride * element;

          TileArgs args{};
          args.a = x.data + tile.begin * x.stride + chunk.begin;
          args.a_stride = x.stride;
          args.panel = multiplied;
          args.k = chunk.size();
          args.acc = sums + tile.begin * width;
          args.accumulate = c > 0;
          if (tiles == 1) {
            args.next_weights = stored + kStreamAhead;
            args.next_lines = ceil_div(4 * row_bytes, kLine);
          } else if (next != nullptr) {
            args.next_weights = next + share(chunk.size() * row_bytes, t, tiles).begin;
            args.next_lines = ceil_div(4 * row_bytes, kLine * tiles);
          }
          if (is_last) {  // a store that misses waits for its line: 3 to 8 % of all where y is larger than L2
            const std::int64_t column = window->column * element;
            args.y = y + column;
            args.y_step = call.y_stride * element;
            args.residual = residual == nullptr ? nullptr : residual + column;
            args.residual_step = call.residual_stride * element;
            args.row_lines = std::min(ceil_div(columns_end * element - column, kLine) + 1, kMaxRowLines);
          }
          tile_fns[tile.size()](args);
          if (is_last)
            epilogue({args.acc, tile.size(), channels.scale, channels.bias, window, n_windows, residual,
                      call.residual_stride, y, call.y_stride});
        }
      }
    }
  }
}

// No output channel is left: nothing but the residual.
void fill(const LinearCall& call) {
  const std::int64_t element = element_bytes(call.element);
  const std::size_t bytes = static_cast<std::size_t>(call.n_out * element);
  for (std::int64_t r = 0; r < call.m; ++r) {
    char* y = static_cast<char*>(call.y) + r * call.y_stride * element;
    if (call.residual == nullptr)
      std::memset(y, 0, bytes);  // zero in both types
    else
      std::memmove(y, static_cast<const char*>(call.residual) + r * call.residual_stride * element, bytes);
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
  require(call.weight.type != WeightType::int8 || call.weight.scale != nullptr || call.weight.n == 0,
          "an int8 weight needs its scale (got none)");
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
  if (call.in_index != nullptr)
    check_index("compact_linear", "in_index", call.in_index, call.weight.k, call.in_features);
  if (call.out_index != nullptr)
    check_index("compact_linear", "out_index", call.out_index, call.weight.n, call.n_out);
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
  static thread_local Reads kept_reads;
  Reads& reads = kept_reads;
  if (call.in_index != nullptr) plan_reads(kernel, call.in_index, call.weight.k, call.in_features, reads);
  if (amx_takes(isa, call.weight.type, call.m)) return amx_linear(call, kernel, windows, reads);
  const std::int64_t panels = ceil_div(call.weight.n, kernel.width);
  // Rows or panels, whichever leaves the fullest thread less to do; at a tie rows, which share nothing.
  const std::int64_t row_tiles = ceil_div(call.m, kernel.rows);
  const std::int64_t by_rows = ceil_div(row_tiles, call.threads) * panels;
  const std::int64_t by_panels = ceil_div(panels, call.threads) * row_tiles;
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, std::max(row_tiles, panels)));
  parallel(threads, [&](int i, int count) {
    if (by_rows <= by_panels)
      run(call, kernel, windows, reads, share(call.m, i, count), {0, panels});
    else
      run(call, kernel, windows, reads, {0, call.m}, share(panels, i, count));
  });
}

}  // namespace prunekern
