// Products of a row of the table, one after another: prepared rows of x times panels, and what becomes of the
// sums.
#pragma once

#include <cstdint>

#include "loops/products.h"
#include "loops/scratch.h"
#include "loops/windows.h"

namespace prunekern {

// Rows of x as a product wants them.
struct PreparedRows {
  const char* tiles;  // [ceil(rows / tile_rows)] row tiles
  std::int64_t rows;
};

// One weight as the pipeline wants it.
struct Layer {
  const char* panels;
  std::int64_t panel_bytes;
  std::int64_t n, k;
  const float* scale;  // [round_up(n, width)], or null: ones
  const float* bias;   // [round_up(n, width)], zero where there is none
  Activation activation;
};

struct LayerScratch {
  Scratch scale, bias;
};

// Scale and bias are copied to `scratch` where they must be padded.
Layer make_layer(const Packed& weight, std::int64_t width, Activation activation, LayerScratch& scratch);

// Where results go: the output columns of each panel, or what the next layer reads.
struct Target {
  const Windows* windows = nullptr;
  char* y = nullptr;  // at the first row
  std::int64_t y_stride = 0;
  const char* residual = nullptr;
  std::int64_t residual_stride = 0;
  Element element = Element::fp32;

  char* tiles = nullptr;  // row tiles of the next layer, row_tile_bytes apart; used where windows is null
  std::int64_t row_tile_bytes = 0;
  std::int64_t k_steps = 0;
};

// target = act(x weight^T + bias), or with a gate act(gate's sums) * (x weight^T + bias), for some panels.
// `again`: the first of them will be needed once more after this.
void multiply_panels(const Product& product, std::int64_t width, const PreparedRows& x, const Layer& layer,
                     const Layer* gate, Range panels, const Target& target, bool again);

}  // namespace prunekern
