#include "loops/pipeline.h"

#include <algorithm>

#include "loops/panels.h"

namespace prunekern {
namespace {

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
  Pipeline(const Product& product, std::int64_t width)
      : product_(product), tile_sums_(product.tile_rows * width) {}

  // The finishes [row_tiles] of the product to come: all but acc and by.
  Finish* finishes() { return finishes_[1 - latest_]; }

  // args: all but acc and what comes before. `gated`: its sums are multiplied with those of the call before.
  void run(ProductArgs& args, FinishFn finish, bool gated) {
    args.before = finishes_[latest_];
    args.n_before = n_waiting_;
    args.finish = finish_;
    latest_ = 1 - latest_;
    args.acc = acc_[latest_];
    product_.multiply(args);
    n_waiting_ = args.row_tiles;
    finish_ = finish;
    for (std::int64_t i = 0; i < n_waiting_; ++i) {
      finishes_[latest_][i].args.acc = acc_[latest_] + i * tile_sums_;
      finishes_[latest_][i].by = gated ? acc_[1 - latest_] + i * tile_sums_ : nullptr;
    }
  }

  void flush() {
    for (std::int64_t i = 0; i < n_waiting_; ++i) {
      Finish& one = finishes_[latest_][i];
      while (one.written < one.args.rows) finish_(one, product_.tile_rows);
    }
    n_waiting_ = 0;
  }

 private:
  const Product& product_;
  const std::int64_t tile_sums_;
  int latest_ = 0;
  std::int64_t n_waiting_ = 0;
  FinishFn finish_ = nullptr;
  Finish finishes_[2][kMaxRowTiles] = {};
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
        element_(element_bytes(target.element)),
        ahead_(product_ahead(x.rows)),
        pipeline_(product, width) {
    args_.row_tile_bytes = x_tile_bytes_;
    args_.k_steps = k_steps_;
    args_.y_step = target.y_stride * element_;
    args_.residual_step = target.residual_stride * element_;
  }

  void run(const Layer& layer, const Layer* gate) {
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p)
      for (std::int64_t i = 0; i < groups_; ++i) run_group(layer, gate, p, i);
    pipeline_.flush();
  }

 private:
  void run_group(const Layer& layer, const Layer* gate, std::int64_t p, std::int64_t i) {
    const std::int64_t group = group_rows(product_), rows = std::min(group, x_.rows - i * group);
    args_.x = x_.tiles + i * product_.row_tiles * x_tile_bytes_;
    args_.rows = rows;
    args_.row_tiles = rows == group ? product_.row_tiles : ceil_div(rows, product_.tile_rows);
    if (gate != nullptr) {
      set_finishes(*gate, p, i, rows, true);
      use_panel(*gate, p, i);
      args_.row_lines = 0;
      pipeline_.run(args_, finish_of(*gate), false);
    }
    set_finishes(layer, p, i, rows, false);
    use_panel(layer, p, i);
    if (target_.windows != nullptr) announce(pipeline_.finishes()[0].args);
    pipeline_.run(args_, finish_of(layer), gate != nullptr);
  }

  FinishFn finish_of(const Layer& layer) const {
    const Element element = target_.windows == nullptr ? product_.between : target_.element;
    return product_.finish[static_cast<int>(element)][static_cast<int>(layer.activation)];
  }

  // Panel p for group i of the rows, and the weights that come next.
  void use_panel(const Layer& layer, std::int64_t p, std::int64_t i) {
    args_.panel = layer.panels + p * layer.panel_bytes;
    args_.readable = (ceil_div(layer.n, width_) - p) * layer.panel_bytes;
    args_.half = (layer.n - p * width_) * 2 <= width_;
    const bool is_last = p + 1 == panels_.end;
    const char* next =
        is_last ? layer.panels + panels_.begin * layer.panel_bytes : args_.panel + layer.panel_bytes;
    args_.next_lines = next_lines_;
    if (groups_ == 1)
      args_.next_weights = args_.panel + ahead_;
    else if (!is_last || again_)
      args_.next_weights = next + share(k_steps_, i, groups_).begin * product_.panel_step_bytes;
    else
      args_.next_lines = 0;
  }

  // What becomes of the `rows` of group i times panel p. Field by field: clearing and copying whole structs
  // took 250 cycles a product, 5 % of a layer of 768 inputs.
  void set_finishes(const Layer& layer, std::int64_t p, std::int64_t i, std::int64_t rows, bool keep) {
    const float* scale = layer.scale == nullptr ? kOnes.values : layer.scale + p * width_;
    const float* bias = layer.bias + p * width_;
    const std::int64_t tile = product_.tile_rows;
    for (std::int64_t t = 0; t < args_.row_tiles; ++t) {
      Finish& one = pipeline_.finishes()[t];
      one.args.rows = std::min(tile, rows - t * tile);
      one.args.scale = scale;
      one.args.bias = bias;
      one.tail = args_.x + t * x_tile_bytes_ + k_steps_ * product_.step_bytes;
      one.keep = keep;
      one.activated = one.written = 0;
      const std::int64_t row_tile = i * product_.row_tiles + t;
      if (target_.windows != nullptr)
        aim_at_windows(row_tile * tile, p, one.args);
      else
        aim_at_tile(row_tile, p, one.args);
    }
  }

  // A whole row tile of the next layer: it reads them all.
  void aim_at_tile(std::int64_t row_tile, std::int64_t p, EpilogueArgs& args) const {
    args.rows = product_.tile_rows;
    args.residual = nullptr;
    args.residual_stride = 0;
    product_.place(target_.tiles + row_tile * target_.row_tile_bytes, target_.k_steps, p, args);
  }

  void aim_at_windows(std::int64_t row, std::int64_t p, EpilogueArgs& args) const {
    const std::int64_t first = target_.windows->first[p];
    args.windows = target_.windows->all.data() + first;
    args.n_windows = target_.windows->first[p + 1] - first;
    args.y = target_.y + row * target_.y_stride * element_;
    args.y_stride = target_.y_stride;
    args.residual =
        target_.residual == nullptr ? nullptr : target_.residual + row * target_.residual_stride * element_;
    args.residual_stride = target_.residual_stride;
  }

  // What the finish of this group of rows will touch. Row tiles need no such care: they are in L2 by design.
  void announce(const EpilogueArgs& finish) {
    const Window &first = finish.windows[0], &last = finish.windows[finish.n_windows - 1];
    const std::int64_t begin = first.column * element_;
    args_.row_lines =
        std::min(ceil_div((last.column + last.width) * element_ - begin, kLine) + 1, kMaxRowLines);
    args_.y = static_cast<const char*>(finish.y) + begin;
    args_.residual = finish.residual == nullptr ? nullptr : static_cast<const char*>(finish.residual) + begin;
  }

  const Product& product_;
  const std::int64_t width_;
  const PreparedRows& x_;
  const Target& target_;
  const Range panels_;
  const bool again_;
  const std::int64_t k_steps_, x_tile_bytes_, groups_, next_lines_, element_, ahead_;
  ProductArgs args_{};
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
