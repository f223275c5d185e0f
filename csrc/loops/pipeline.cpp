#include "loops/pipeline.h"

#include <algorithm>

#include "loops/panels.h"

namespace prunekern {
namespace {

// Bytes of weights drawn in ahead where a block is one group of rows: 16 KB was the best on Sapphire Rapids.
constexpr std::int64_t kAhead = 16384;
constexpr int kMaxRowTiles = 2;

struct Ones {
  alignas(64) float values[kMaxWidth];
  constexpr Ones() : values() {
    for (float& value : values) value = 1.0f;
  }
};
constexpr Ones kOnes;

// Runs products one after another, the finish of each during the next.
class Pipeline {
 public:
  explicit Pipeline(const Product& product, std::int64_t width)
      : product_(product), tile_sums_(product.tile_rows * width) {}

  // args: all but acc and what comes before. `finishes` [row_tiles], all but acc, is kept for the next call;
  // `gated`: its sums are multiplied with those of the call before.
  void run(ProductArgs& args, const Finish* finishes, FinishFn finish, bool gated) {
    latest_ = 1 - latest_;
    args.acc = acc_[latest_];
    args.before = waiting_;
    args.n_before = n_waiting_;
    args.finish = finish_;
    product_.multiply(args);
    n_waiting_ = args.row_tiles;
    finish_ = finish;
    for (std::int64_t i = 0; i < n_waiting_; ++i) {
      waiting_[i] = finishes[i];
      waiting_[i].args.acc = acc_[latest_] + i * tile_sums_;
      waiting_[i].by = gated ? acc_[1 - latest_] + i * tile_sums_ : nullptr;
    }
  }

  void flush() {
    for (std::int64_t i = 0; i < n_waiting_; ++i)
      while (waiting_[i].written < waiting_[i].args.rows) finish_(waiting_[i], product_.tile_rows);
    n_waiting_ = 0;
  }

 private:
  const Product& product_;
  const std::int64_t tile_sums_;
  int latest_ = 0;
  Finish waiting_[kMaxRowTiles] = {};
  std::int64_t n_waiting_ = 0;
  FinishFn finish_ = nullptr;
  alignas(64) float acc_[2][kMaxProductSums + kMaxWidth] = {};  // readable one vector past their ends
};

// One call of multiply_panels.
class Panels {
 public:
  Panels(const Product& product, std::int64_t width, const PreparedRows& x, const Target& target,
         Range panels, bool again, std::int64_t k)
      : product_(product),
        width_(width),
        x_(x),
        target_(target),
        panels_(panels),
        again_(again),
        k_steps_(steps(product, k)),
        x_tile_bytes_(row_tile_bytes(product, k)),
        groups_(ceil_div(x.rows, group_rows(product))),
        next_lines_(ceil_div(product.panel_step_bytes, kLine * groups_)),
        pipeline_(product, width) {}

  void run(const Layer& layer, const Layer* gate) {
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p)
      for (std::int64_t i = 0; i < groups_; ++i) run_group(layer, gate, p, i);
    pipeline_.flush();
  }

 private:
  void run_group(const Layer& layer, const Layer* gate, std::int64_t p, std::int64_t i) {
    const std::int64_t group = group_rows(product_), row = i * group, rows = std::min(group, x_.rows - row);
    ProductArgs args{};
    args.x = x_.tiles + i * product_.row_tiles * x_tile_bytes_;
    args.row_tiles = rows == group ? product_.row_tiles : ceil_div(rows, product_.tile_rows);
    args.row_tile_bytes = x_tile_bytes_;
    args.k_steps = k_steps_;
    Finish finishes[kMaxRowTiles];
    for (std::int64_t t = 0; t < args.row_tiles; ++t) {
      const std::int64_t first = t * product_.tile_rows;
      finishes[t] =
          finish_at(row + first, std::min(product_.tile_rows, rows - first), i * product_.row_tiles + t, p);
      finishes[t].tail = args.x + t * x_tile_bytes_ + k_steps_ * product_.step_bytes;
    }
    if (gate != nullptr) {
      use_panel(*gate, p, i, args);
      Finish kept[kMaxRowTiles];
      for (std::int64_t t = 0; t < args.row_tiles; ++t) {
        kept[t] = finishes[t];
        kept[t].keep = true;
      }
      use_channels(*gate, p, kept, args.row_tiles);
      pipeline_.run(args, kept, finish_of(*gate), false);
    }
    use_panel(layer, p, i, args);
    use_channels(layer, p, finishes, args.row_tiles);
    announce(finishes[0], rows, args);
    pipeline_.run(args, finishes, finish_of(layer), gate != nullptr);
  }

  FinishFn finish_of(const Layer& layer) const {
    const Element element = target_.windows == nullptr ? product_.between : target_.element;
    return product_.finish[static_cast<int>(element)][static_cast<int>(layer.activation)];
  }

  // Panel p for group i of the rows, and the weights that come next.
  void use_panel(const Layer& layer, std::int64_t p, std::int64_t i, ProductArgs& args) const {
    args.panel = layer.panels + p * layer.panel_bytes;
    const bool is_last = p + 1 == panels_.end;
    const char* next =
        is_last ? layer.panels + panels_.begin * layer.panel_bytes : args.panel + layer.panel_bytes;
    args.next_lines = next_lines_;
    if (groups_ == 1) {
      args.next_weights = args.panel + kAhead;
    } else if (!is_last || again_) {
      args.next_weights = next + share(k_steps_, i, groups_).begin * product_.panel_step_bytes;
    } else {
      args.next_lines = 0;
    }
  }

  void use_channels(const Layer& layer, std::int64_t p, Finish* finishes, std::int64_t count) const {
    for (std::int64_t t = 0; t < count; ++t) {
      finishes[t].args.scale = layer.scale == nullptr ? kOnes.values : layer.scale + p * width_;
      finishes[t].args.bias = layer.bias + p * width_;
    }
  }

  // Where the rows `row` .. `row + rows` of a panel go: row tile `tile` of x.
  Finish finish_at(std::int64_t row, std::int64_t rows, std::int64_t tile, std::int64_t panel) const {
    Finish finish{};
    EpilogueArgs& args = finish.args;
    args.rows = rows;
    if (target_.windows == nullptr) {
      args.rows = product_.tile_rows;  // the next layer reads whole tiles
      product_.place(target_.tiles + tile * target_.row_tile_bytes, target_.k_steps, panel, args);
      return finish;
    }
    const std::int64_t bytes = element_bytes(target_.element);
    const std::int64_t first = target_.windows->first[panel], last = target_.windows->first[panel + 1];
    args.windows = target_.windows->all.data() + first;
    args.n_windows = last - first;
    args.y = target_.y + row * target_.y_stride * bytes;
    args.y_stride = target_.y_stride;
    if (target_.residual != nullptr) args.residual = target_.residual + row * target_.residual_stride * bytes;
    args.residual_stride = target_.residual_stride;
    return finish;
  }

  // What the finish of this group of rows will touch.
  void announce(const Finish& finish, std::int64_t rows, ProductArgs& args) const {
    if (target_.windows == nullptr) return;  // row tiles of a block: in L2 by design
    const std::int64_t bytes = element_bytes(target_.element);
    const Window &first = finish.args.windows[0], &last = finish.args.windows[finish.args.n_windows - 1];
    args.rows = rows;
    args.row_lines =
        std::min(ceil_div((last.column + last.width - first.column) * bytes, kLine) + 1, kMaxRowLines);
    args.y = static_cast<const char*>(finish.args.y) + first.column * bytes;
    args.y_step = target_.y_stride * bytes;
    if (finish.args.residual == nullptr) return;
    args.residual = static_cast<const char*>(finish.args.residual) + first.column * bytes;
    args.residual_step = target_.residual_stride * bytes;
  }

  const Product& product_;
  const std::int64_t width_;
  const PreparedRows& x_;
  const Target& target_;
  const Range panels_;
  const bool again_;
  const std::int64_t k_steps_, x_tile_bytes_, groups_, next_lines_;
  Pipeline pipeline_;
};

// [n] as whole panels, what is missing filled; itself where nothing is missing.
const float* padded(const float* values, std::int64_t n, std::int64_t width, float fill, Scratch& scratch) {
  if (values != nullptr && n % width == 0) return values;
  const std::int64_t size = round_up(n, width);
  float* to = scratch.get<float>(size);
  std::fill_n(to, size, fill);
  if (values != nullptr) std::copy_n(values, n, to);
  return to;
}

}  // namespace

Layer make_layer(const Packed& weight, std::int64_t width, Activation activation, LayerScratch& scratch) {
  Layer layer{};
  layer.panels = static_cast<const char*>(weight.data);
  layer.panel_bytes = panel_bytes(weight.type, width, weight.k);
  layer.n = weight.n;
  layer.k = weight.k;
  if (layout(weight.type).is_scaled) layer.scale = padded(weight.scale, weight.n, width, 1.0f, scratch.scale);
  layer.bias = padded(weight.bias, weight.n, width, 0.0f, scratch.bias);
  layer.activation = activation;
  return layer;
}

void multiply_panels(const Product& product, std::int64_t width, const PreparedRows& x, const Layer& layer,
                     const Layer* gate, Range panels, const Target& target, bool again) {
  Panels(product, width, x, target, panels, again, layer.k).run(layer, gate);
}

}  // namespace prunekern
