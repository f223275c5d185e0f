#include "amx_blocks.h"

#include <algorithm>

#include "packed.h"

namespace prunekern {
namespace {

constexpr std::int64_t kPairRows = 2 * kTileRows, kTileSums = kTileRows * kPanelWidth;
constexpr std::int64_t kStepBytes = kTileInputs * kPanelWidth * 2;  // of a panel
constexpr std::int64_t kStreamAhead =
    16384;  // bytes prefetched ahead where a block is a single pair of row tiles
constexpr std::int64_t kMaxRowLines = 8;  // of y, prefetched for a row: a panel and its gaps, seldom more

alignas(64) const float kOnes[kPanelWidth] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                              1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
const Window kPlain[2] = {{0, 0, 16, 0xffff}, {16, 16, 16, 0xffff}};

// Runs tiles one after another, the epilogue of each in the shadow of the next.
class Pipeline {
 public:
  // args: all but acc and what comes before. `finishes` [row_tiles], all but acc, is kept for the next call;
  // `gated`: its sums are multiplied with those of the call before.
  void run(AmxTileArgs& args, const AmxFinish* finishes, AmxFinishFn finish, bool gated) {
    latest_ = 1 - latest_;
    args.acc = acc_[latest_];
    args.before = waiting_;
    args.n_before = n_waiting_;
    args.finish = finish_;
    amx_tile(args);
    n_waiting_ = args.row_tiles;
    finish_ = finish;
    for (std::int64_t i = 0; i < n_waiting_; ++i) {
      waiting_[i] = finishes[i];
      waiting_[i].args.acc = acc_[latest_] + i * kTileSums;
      waiting_[i].by = gated ? acc_[1 - latest_] + i * kTileSums : nullptr;
    }
  }

  void flush() {
    for (std::int64_t i = 0; i < n_waiting_; ++i)
      while (waiting_[i].written < waiting_[i].args.rows) finish_(waiting_[i], kTileRows);
    n_waiting_ = 0;
  }

 private:
  int latest_ = 0;
  AmxFinish waiting_[2] = {};
  std::int64_t n_waiting_ = 0;
  AmxFinishFn finish_ = nullptr;
  alignas(64) float acc_[2][2 * kTileSums + kPanelWidth] = {};  // readable one vector past their ends
};

// Where the rows `row` .. `row + rows` (one row tile) of a panel go.
AmxFinish finish_at(const AmxTarget& target, std::int64_t row, std::int64_t rows, std::int64_t panel) {
  AmxFinish finish{};
  EpilogueArgs& args = finish.args;
  args.rows = rows;
  args.scale = kOnes;
  if (target.windows == nullptr) {
    args.rows = kTileRows;  // the next layer reads whole tiles
    args.windows = kPlain;
    args.n_windows = 2;
    args.y = target.tiles + (row / kTileRows * target.k_steps + panel) * kTileValues;
    args.y_stride = kTileInputs;
    return finish;
  }
  const std::int64_t bytes = element_bytes(target.element);
  const std::int64_t first = target.windows->first[panel], last = target.windows->first[panel + 1];
  args.windows = target.windows->all.data() + first;
  args.n_windows = last - first;
  args.y = target.y + row * target.y_stride * bytes;
  args.y_stride = target.y_stride;
  if (target.residual != nullptr) args.residual = target.residual + row * target.residual_stride * bytes;
  args.residual_stride = target.residual_stride;
  return finish;
}

// What the finish of this pair of row tiles will touch.
void announce(const AmxTarget& target, const AmxFinish& finish, std::int64_t rows, AmxTileArgs& args) {
  if (target.windows == nullptr) return;  // tiles of a block: in L2 by design
  const std::int64_t bytes = element_bytes(target.element);
  const Window &first = finish.args.windows[0], &last = finish.args.windows[finish.args.n_windows - 1];
  args.rows = rows;
  args.row_lines =
      std::min(ceil_div((last.column + last.width - first.column) * bytes, kLine) + 1, kMaxRowLines);
  args.y = static_cast<const char*>(finish.args.y) + first.column * bytes;
  args.y_step = target.y_stride * bytes;
  if (finish.args.residual == nullptr) return;
  args.residual = static_cast<const char*>(finish.args.residual) + first.column * bytes;
  args.residual_step = target.residual_stride * bytes;
}

}  // namespace

AmxLayer amx_layer(const Packed& weight, Activation activation, Scratch& scratch) {
  AmxLayer layer{static_cast<const char*>(weight.data), weight.n, weight.k, weight.bias, activation};
  if (weight.bias != nullptr && weight.n % kPanelWidth == 0) return layer;
  const std::int64_t padded = round_up(weight.n, kPanelWidth);
  float* bias = scratch.get<float>(padded);
  std::fill_n(bias, padded, 0.0f);
  if (weight.bias != nullptr) std::copy_n(weight.bias, weight.n, bias);
  layer.bias = bias;
  return layer;
}

void amx_multiply(const AmxRows& x, const AmxLayer& layer, const AmxLayer* gate, Range panels,
                  const AmxTarget& target, bool again) {
  Pipeline pipeline;
  const std::int64_t k_steps = amx_steps(layer.k), panel_bytes = k_steps * kStepBytes;
  const std::int64_t pairs = ceil_div(x.rows, kPairRows);
  const bool to_bf16 = target.windows == nullptr || target.element == Element::bf16;
  const AmxFinishFn finish = amx_finish(to_bf16, layer.activation);
  const AmxFinishFn gate_finish = gate == nullptr ? nullptr : amx_finish(to_bf16, gate->activation);
  for (std::int64_t p = panels.begin; p < panels.end; ++p)
    for (std::int64_t i = 0; i < pairs; ++i) {
      const std::int64_t row = i * kPairRows, rows = std::min(kPairRows, x.rows - row);
      AmxTileArgs args{};
      args.a = x.tiles + row * k_steps * kTileInputs;
      args.row_tiles = ceil_div(rows, kTileRows);
      args.k_steps = k_steps;
      const auto use_panel = [&](const AmxLayer& one) {
        args.panel = one.panels + p * panel_bytes;
        const char* next =
            p + 1 < panels.end ? args.panel + panel_bytes : one.panels + panels.begin * panel_bytes;
        if (pairs == 1) {
          args.next_weights = args.panel + kStreamAhead;
          args.next_lines = kStepBytes / kLine;
        } else if (p + 1 < panels.end || again) {
          args.next_weights = next + share(k_steps, i, pairs).begin * kStepBytes;
          args.next_lines = ceil_div(kStepBytes, kLine * pairs);
        }
      };
      AmxFinish finishes[2];
      for (std::int64_t t = 0; t < args.row_tiles; ++t)
        finishes[t] = finish_at(target, row + t * kTileRows,
                                std::min<std::int64_t>(kTileRows, rows - t * kTileRows), p);
      if (gate != nullptr) {
        use_panel(*gate);
        AmxFinish kept[2] = {finishes[0], finishes[1]};
        for (AmxFinish& one : kept) {
          one.keep = true;
          one.args.bias = gate->bias + p * kPanelWidth;
        }
        pipeline.run(args, kept, gate_finish, false);
      }
      use_panel(layer);
      for (AmxFinish& one : finishes) one.args.bias = layer.bias + p * kPanelWidth;
      announce(target, finishes[0], rows, args);
      pipeline.run(args, finishes, finish, gate != nullptr);
    }
  pipeline.flush();
}

}  // namespace prunekern
