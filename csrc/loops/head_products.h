// The products of one attention head: rows as they lie, or rounded to bf16, times packed columns.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/kernel.h"
#include "loops/caches.h"
#include "loops/products.h"
#include "loops/scratch.h"
#include "loops/shares.h"

namespace prunekern {

// Parts of one piece of memory, each at a line of its own.
class Parts {
 public:
  // Counts where data is null.
  explicit Parts(float* data) : data_(data) {}
  float* take(std::int64_t floats) {
    float* part = data_ == nullptr ? nullptr : data_ + taken_;
    taken_ += round_up(floats, kLine / 4);
    return part;
  }
  std::int64_t taken() const { return taken_; }

 private:
  float* data_;
  std::int64_t taken_ = 0;
};

// Columns of a product, packed for the tiles.
struct Panels {
  float* fp32;
  float* pairs;  // for products of bf16, or null
  std::int64_t columns, inputs;
};

class HeadProducts {
 public:
  // pairs: products of bf16, or null: fp32.
  HeadProducts(const Kernels& kernel, const Product* pairs)
      : kernel_(kernel), pairs_(pairs), width_(kernel.width) {}

 protected:
  // Memory for so many columns.
  Panels take_panels(Parts& parts, std::int64_t columns, std::int64_t inputs) const {
    const std::int64_t count = ceil_div(columns, width_);
    float* fp32 = parts.take(count * width_ * inputs);
    if (pairs_ == nullptr) return {fp32, nullptr, columns, inputs};
    return {fp32, parts.take(count * steps(*pairs_, inputs) * pairs_->panel_step_bytes / 4), columns, inputs};
  }
  // Memory for the rows of a tile: of so many inputs where they lie strided, and of any.
  void take_rows(Parts& parts, std::int64_t strided, std::int64_t most) {
    rows_stride_ = odd_lines(strided);
    rows_ = parts.take(kernel_.rows * rows_stride_);
    tile_ = parts.take(pairs_ == nullptr ? 0 : row_tile_bytes(*pairs_, most) / 4);
  }

  void pair_up(const Panels& panels) const {
    if (pairs_ != nullptr)
      pairs_->pair_up(panels.fp32, ceil_div(panels.columns, width_), panels.inputs,
                      reinterpret_cast<char*>(panels.pairs));
  }

  // Rows as products read them.
  const float* ready(const float* x, std::int64_t& stride, std::int64_t count, std::int64_t k) const {
    if (pairs_ != nullptr) {
      PrepareArgs args{};
      args.x = x;
      args.x_stride = stride;
      args.rows = count;
      args.k = k;
      args.to = reinterpret_cast<char*>(tile_);
      pairs_->prepare[static_cast<int>(Element::fp32)](args);
      return tile_;
    }
    if (stride * 4 % 4096 != 0) return x;
    for (std::int64_t r = 0; r < count; ++r)  // whole pages: they would meet in one set of L1
      std::memcpy(rows_ + r * rows_stride_, x + r * stride, static_cast<std::size_t>(k) * 4);
    stride = rows_stride_;
    return rows_;
  }

  // Ready rows x inputs first .. first + k of one panel, [count, width]; its columns from `skipped` on, half
  // a panel or nothing.
  void multiply(const float* x, std::int64_t stride, std::int64_t count, const Panels& panels,
                std::int64_t panel, std::int64_t first, std::int64_t k, float* acc, std::int64_t columns,
                std::int64_t skipped = 0) const {
    if (pairs_ != nullptr) {  // first is a whole number of steps
      ProductArgs args{};
      args.x = reinterpret_cast<const char*>(x);
      args.row_tiles = 1;
      args.panel = reinterpret_cast<const char*>(panels.pairs) +
                   (panel * steps(*pairs_, panels.inputs) + steps(*pairs_, first)) * pairs_->panel_step_bytes;
      args.k_steps = steps(*pairs_, k);
      args.acc = acc;
      args.half = columns <= kernel_.vector;
      args.rows = count;
      pairs_->multiply(args);
      return;
    }
    TileArgs args{};
    args.a = x;
    args.a_stride = stride;
    args.panel = panels.fp32 + (panel * panels.inputs + first) * width_ + skipped;
    args.k = k;
    args.acc = acc;
    (columns > kernel_.vector ? kernel_.tile : kernel_.half_tile)[count](args);
  }

  const Kernels& kernel_;
  const Product* pairs_;
  std::int64_t width_;

 private:
  float *rows_ = nullptr, *tile_ = nullptr;
  std::int64_t rows_stride_ = 0;
};

}  // namespace prunekern
