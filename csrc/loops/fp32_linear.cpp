// Blocks of rows, groups of panels, chunks of k, tiles.
//
// What to expect of one core at about 165 GFLOP/s (fp32 FMA) and 24 GB/s from the last-level cache:
// - Every row block streams all of the weights: 4 bytes of weight make 2 flops a row, so up to
//   165 / (2 * 24 / 4) = 14 rows the bytes bind (at 1 row: 12 GFLOP/s), beyond it the FMAs.
// - At 16 rows the two times are equal and only overlap hides one of them: weights are prefetched a panel
//   ahead, spread over the tiles of the panel before.
// - A block of 128 rows re-reads weights at 165 / (2 * 128) * 4 = 2.6 GB/s: out of the way.
#include <algorithm>

#include "loops/caches.h"
#include "loops/linear.h"
#include "loops/panels.h"
#include "loops/rows.h"

namespace prunekern {
namespace {

constexpr std::int64_t kBlockRows = 140;  // ten full tiles of 14
constexpr std::int64_t kDepth = 1536;     // inputs of a chunk: 140 rows of it take a bit under half of L2
constexpr std::int64_t kSumsBytes = 256 * 1024;    // of a group of panels, kept from chunk to chunk
constexpr std::int64_t kWidenedBytes = 24 * 1024;  // of one tile's widened chunk: half of L1
constexpr std::int64_t kStreamRows = 24;  // up to here bf16 and int8 weights are widened on their way

// Memory of one thread, kept between calls.
struct Workspace {
  Scratch rows, sums, weights;
};

class Loops {
 public:
  explicit Loops(const Linear& linear)
      : call_(linear.call),
        weight_(call_.weight),
        kernels_(linear.kernels),
        windows_(linear.windows),
        input_(linear.input()),
        widen_(kernels_.widen[static_cast<int>(weight_.type)]),
        streams_(kernels_.stream[static_cast<int>(weight_.type)]),
        epilogue_(kernels_.epilogue[static_cast<int>(call_.element)][static_cast<int>(call_.activation)]),
        together_(std::max(layout(weight_.type).side_by_side, 4)),
        width_(kernels_.width),
        element_(element_bytes(call_.element)),
        panel_bytes_(panel_bytes(weight_.type, width_, weight_.k)) {}

  // Rows of one block. A chunk of their x stays in L2 while the weights of many panels stream past it.
  void run(Range rows, Range panels, const char* after) {
    rows_ = rows;
    tiles_ = ceil_div(rows.size(), kernels_.rows);
    x_ = take_rows(input_, kernels_, rows, workspace().rows);
    const std::int64_t k = weight_.k;
    if (streams_[1] != nullptr && rows.size() <= kStreamRows) {
      tiles_ = ceil_div(rows.size(), kernels_.stream_rows);
      sums_ = workspace().sums.get<float>(kernels_.rows * width_ + kernels_.vector);
      for (std::int64_t p = panels.begin; p < panels.end; ++p) stream_panel(p);
      return;
    }
    // Chunks of k, all of about one size, in whole steps of the tile. One tile reads each weight once: there
    // is nothing to keep, unless weights are widened.
    const std::int64_t most = tiles_ > 1          ? kDepth
                              : widen_ != nullptr ? kWidenedBytes / (4 * width_)
                                                  : std::max<std::int64_t>(k, 1);
    const std::int64_t chunks = std::max<std::int64_t>(ceil_div(k, most), 1);
    const std::int64_t depth = round_up(ceil_div(k, chunks), together_);
    const std::int64_t sums = rows.size() * width_;  // of a panel
    const std::int64_t group = chunks == 1 ? 1 : std::max<std::int64_t>(kSumsBytes / (4 * sums), 1);
    sums_ = workspace().sums.get<float>(group * sums + kernels_.vector);
    for (std::int64_t first = panels.begin; first < panels.end; first += group) {
      const std::int64_t last = std::min(first + group, panels.end);
      for (std::int64_t c = 0; c < chunks; ++c) {
        const Range chunk{c * depth, std::min((c + 1) * depth, k)};
        for (std::int64_t p = first; p < last; ++p) {
          const char* next = p + 1 < last        ? stored(p + 1, chunk.begin)
                             : c + 1 < chunks    ? stored(first, chunk.end)
                             : last < panels.end ? stored(last, 0)
                                                 : after;
          run_panel(p, chunk, sums_ + (p - first) * sums, next);
        }
      }
    }
  }

  const char* stored(std::int64_t panel, std::int64_t k) const {
    return static_cast<const char*>(weight_.data) + panel * panel_bytes_ +
           inputs_bytes(weight_.type, width_, k);
  }

 private:
  static Workspace& workspace() {
    static thread_local Workspace kept;
    return kept;
  }

  // All tiles of the block times one chunk of one panel. next: the weights that will be multiplied after
  // these.
  void run_panel(std::int64_t p, Range chunk, float* sums, const char* next) {
    const std::int64_t channels = std::min(width_, weight_.n - p * width_);
    const TileFn* tiles = channels * 2 > width_ ? kernels_.tile : kernels_.half_tile;
    const bool is_last = chunk.end == weight_.k;
    const char* here = stored(p, chunk.begin);
    const std::int64_t chunk_bytes = inputs_bytes(weight_.type, width_, chunk.size());
    const std::int64_t step_bytes = inputs_bytes(weight_.type, width_, 4);

    TileArgs args{};
    args.panel = widen_ == nullptr ? reinterpret_cast<const float*>(here) : widened(here, chunk.size());
    args.k = chunk.size();
    args.a_stride = x_.stride;
    args.accumulate = chunk.begin > 0;
    for (std::int64_t t = 0; t < tiles_; ++t) {
      const Range tile = share(rows_.size(), t, tiles_);  // 16 rows: 8 + 8, not 14 + 2
      args.a = x_.data + tile.begin * x_.stride + chunk.begin;
      args.acc = sums + tile.begin * width_;
      if (tiles_ == 1) {
        args.next_weights = here + stream_ahead(rows_.size() <= 2);
        args.next_lines = ceil_div(step_bytes, kLine);
      } else if (next != nullptr) {
        args.next_weights = next + share(chunk_bytes, t, tiles_).begin;
        args.next_lines = ceil_div(step_bytes, kLine * tiles_);
      }
      if (is_last) draw_outputs(p, tile, args);
      tiles[tile.size()](args);
      if (is_last) finish(p, tile, args.acc);
    }
  }

  // All of k, weights widened on the way.
  void stream_panel(std::int64_t p) {
    StreamArgs args{};
    args.a_stride = x_.stride;
    args.panel = stored(p, 0);
    args.k = weight_.k;
    args.acc = sums_;
    args.into_l1 = rows_.size() == 1 && weight_.type == WeightType::bf16 && is_amd();
    args.ahead = args.into_l1 ? kStreamAheadL1 : stream_ahead(false);
    for (std::int64_t t = 0; t < tiles_; ++t) {
      const Range tile = share(rows_.size(), t, tiles_);
      args.a = x_.data + tile.begin * x_.stride;
      streams_[tile.size()](args);
      finish(p, tile, sums_);
    }
  }

  const float* widened(const char* from, std::int64_t k) {
    float* to = workspace().weights.get<float>(round_up(k, together_) * width_);
    widen_({from, k, to});
    return to;
  }

  // A store that misses waits for its line: 3 to 8 % of the whole where y is larger than L2.
  void draw_outputs(std::int64_t p, Range tile, TileArgs& args) const {
    const Window& first = windows_.all[windows_.first[p]];
    const Window& last = windows_.all[windows_.first[p + 1] - 1];
    const std::int64_t begin = first.column * element_, end = (last.column + last.width) * element_;
    args.y = y(tile) + begin;
    args.y_step = call_.y_stride * element_;
    args.residual = call_.residual == nullptr ? nullptr : residual(tile) + begin;
    args.residual_step = call_.residual_stride * element_;
    args.row_lines = std::min(ceil_div(end - begin, kLine) + 1, kMaxRowLines);
  }

  void finish(std::int64_t p, Range tile, float* acc) {
    if (p != loaded_) load_channels(p);
    EpilogueArgs args{};
    args.acc = acc;
    args.rows = tile.size();
    args.scale = scale_;
    args.bias = bias_;
    args.windows = windows_.all.data() + windows_.first[p];
    args.n_windows = windows_.first[p + 1] - windows_.first[p];
    args.residual = call_.residual == nullptr ? nullptr : residual(tile);
    args.residual_stride = call_.residual_stride;
    args.y = y(tile);
    args.y_stride = call_.y_stride;
    epilogue_(args);
  }

  // Scale and bias of a panel, with ones and zeros where there is none.
  void load_channels(std::int64_t p) {
    const std::int64_t first = p * width_, count = std::min(width_, weight_.n - first);
    std::fill_n(scale_, width_, 1.0f);
    std::fill_n(bias_, width_, 0.0f);
    if (layout(weight_.type).is_scaled) std::copy_n(weight_.scale + first, count, scale_);
    if (weight_.bias != nullptr) std::copy_n(weight_.bias + first, count, bias_);
    loaded_ = p;
  }

  char* y(Range tile) const {
    return static_cast<char*>(call_.y) + (rows_.begin + tile.begin) * call_.y_stride * element_;
  }
  const char* residual(Range tile) const {
    return static_cast<const char*>(call_.residual) +
           (rows_.begin + tile.begin) * call_.residual_stride * element_;
  }

  const LinearCall& call_;
  const Packed& weight_;
  const Kernels& kernels_;
  const Windows& windows_;
  const Input input_;
  const WidenFn widen_;
  const StreamFn* const streams_;  // by rows
  const EpilogueFn epilogue_;
  const std::int64_t together_;  // inputs of a chunk come in multiples of this
  const std::int64_t width_, element_;
  const std::int64_t panel_bytes_;  // of packed weights

  Range rows_{};  // of the block
  std::int64_t tiles_ = 0;
  Rows x_{};
  float* sums_ = nullptr;
  std::int64_t loaded_ = -1;  // the panel of scale_ and bias_
  alignas(64) float scale_[kMaxWidth], bias_[kMaxWidth];
};

}  // namespace

void fp32_linear(const Linear& linear, Range rows, Range panels) {
  Loops loops(linear);
  const std::int64_t blocks = ceil_div(rows.size(), kBlockRows);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Range block = share(rows.size(), b, blocks);
    loops.run({rows.begin + block.begin, rows.begin + block.end}, panels,
              b + 1 < blocks ? loops.stored(panels.begin, 0) : nullptr);
  }
}

}  // namespace prunekern
