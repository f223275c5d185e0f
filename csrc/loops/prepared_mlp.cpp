#include <algorithm>

#include "loops/mlp.h"
#include "loops/panels.h"
#include "loops/prepared.h"

namespace prunekern {
namespace {

// Memory of one thread, kept between calls.
struct Workspace {
  PreparedScratch rows, between;
  Scratch whole;
  LayerScratch up, gate, down;
  Windows whole_windows;

  static Workspace& get() {
    static thread_local Workspace kept;
    return kept;
  }
};

class Blocks {
 public:
  Blocks(const Product& product, const Mlp& mlp)
      : product_(product),
        mlp_(mlp),
        call_(mlp.call),
        memory_(Workspace::get()),
        width_(mlp.kernels.width),
        gated_(call_.gate.data != nullptr),
        up_(make_layer(call_.up, width_, gated_ ? Activation::none : call_.activation, memory_.up)),
        gate_(gated_ ? make_layer(call_.gate, width_, call_.activation, memory_.gate) : Layer{}),
        down_(make_layer(call_.down, width_, Activation::none, memory_.down)) {
    if (product.place == nullptr) make_windows(mlp.kernels, nullptr, up_.n, up_.n, memory_.whole_windows);
  }

  void run(Range rows) {
    // Both sides of the intermediate in L2; where that leaves too few rows to hide the weights (k + n =
    // 15,000 bf16 inputs give 32), `up` and `down` each go through the block in parts that fit them.
    const std::int64_t least = 4 * group_rows(product_);
    const std::int64_t blocks = ceil_div(rows.size(), std::max(rows_that_fit(), least));
    for (std::int64_t b = 0; b < blocks; ++b) {
      const Range block = share_groups(rows, group_rows(product_), b, blocks);
      if (block.size() == 0) continue;
      const bool is_last = b + 1 == blocks;
      const PreparedRows x = prepare_rows(product_, mlp_.kernels, mlp_.input(), block, memory_.rows);
      run_down(product_.place != nullptr ? place_between(x, is_last) : keep_between(x, is_last), block.begin,
               is_last);
    }
  }

 private:
  std::int64_t rows_that_fit() const {
    if (product_.place != nullptr) return block_rows(product_, up_.k + up_.n);
    const std::int64_t both =
        (row_tile_bytes(product_, up_.k) + row_tile_bytes(product_, up_.n)) / product_.tile_rows;
    return block_rows(product_, both + 4 * up_.n, std::max(up_.panel_bytes, down_.panel_bytes));
  }

  // The rows between the layers, prepared as they are made.
  PreparedRows place_between(const PreparedRows& x, bool is_last) {
    Target target;
    target.tiles = memory_.between.tiles.get<char>(prepared_bytes(product_, x.rows, up_.n));
    target.row_tile_bytes = row_tile_bytes(product_, up_.n);
    target.k_steps = steps(product_, up_.n);
    char* first = target.tiles;
    in_parts(x, up_.k, is_last, [&](const PreparedRows& part, std::int64_t row, bool again) {
      target.tiles = first + prepared_bytes(product_, row, up_.n);
      multiply(part, up_, gated_ ? &gate_ : nullptr, target, again);
    });
    return {first, x.rows};
  }

  // The same where a row must be whole before it is prepared.
  PreparedRows keep_between(const PreparedRows& x, bool is_last) {
    const std::int64_t stride = round_up(up_.n, kLine / 4);
    float* whole = memory_.whole.get<float>(x.rows * stride);
    Target target;
    target.windows = &memory_.whole_windows;
    target.element = Element::fp32;
    target.y_stride = stride;
    in_parts(x, up_.k, is_last, [&](const PreparedRows& part, std::int64_t row, bool again) {
      target.y = reinterpret_cast<char*>(whole + row * stride);
      multiply(part, up_, gated_ ? &gate_ : nullptr, target, again);
    });
    return prepare_rows(product_, mlp_.kernels, {whole, stride, up_.n, up_.n, Element::fp32, nullptr},
                        {0, x.rows}, memory_.between);
  }

  // begin: the row of the call where the block begins.
  void run_down(const PreparedRows& between, std::int64_t begin, bool is_last) {
    const std::int64_t element = element_bytes(call_.element);
    Target target;
    target.windows = &mlp_.windows;
    target.element = call_.element;
    target.y_stride = call_.y_stride;
    target.residual_stride = call_.residual_stride;
    in_parts(between, down_.k, is_last, [&](const PreparedRows& part, std::int64_t row, bool again) {
      target.y = static_cast<char*>(call_.y) + (begin + row) * call_.y_stride * element;
      if (call_.residual != nullptr)
        target.residual =
            static_cast<const char*>(call_.residual) + (begin + row) * call_.residual_stride * element;
      multiply(part, down_, nullptr, target, again);
    });
  }

  // run(part, its first row, whether the layer's weights will be needed again) for parts that fit k inputs.
  template <class Run>
  void in_parts(const PreparedRows& all, std::int64_t k, bool is_last, const Run& run) {
    const std::int64_t count = ceil_div(all.rows, block_rows(product_, k));
    for (std::int64_t i = 0; i < count; ++i) {
      const Range part = share_groups({0, all.rows}, group_rows(product_), i, count);
      run(PreparedRows{all.tiles + prepared_bytes(product_, part.begin, k), part.size()}, part.begin,
          i + 1 < count || !is_last);
    }
  }

  void multiply(const PreparedRows& x, const Layer& layer, const Layer* gate, const Target& target,
                bool again) {
    multiply_panels(product_, width_, x, layer, gate, {0, ceil_div(layer.n, width_)}, target, again);
  }

  const Product& product_;
  const Mlp& mlp_;
  const MlpCall& call_;
  Workspace& memory_;
  const std::int64_t width_;
  const bool gated_;
  const Layer up_, gate_, down_;
};

}  // namespace

void prepared_mlp(const Product& product, const Mlp& mlp, Range rows) {
  const Session session(product);
  Blocks(product, mlp).run(rows);
}

}  // namespace prunekern
