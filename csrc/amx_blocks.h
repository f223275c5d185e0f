// The loops of AMX, shared by compact_linear and compact_mlp: blocks of rows as tiles, panels, pairs of row
// tiles.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "kernels/amx.h"
#include "plan.h"

namespace prunekern {

// A thread's tiles, for as long as this lives.
struct AmxSession {
  AmxSession() { amx_begin(); }
  ~AmxSession() { amx_end(); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
};

inline std::int64_t amx_steps(std::int64_t k) { return ceil_div(k, kTileInputs); }
// Values of `rows` rows of k inputs as tiles.
inline std::int64_t amx_values(std::int64_t rows, std::int64_t k) {
  return ceil_div(rows, kTileRows) * amx_steps(k) * kTileValues;
}

// Rows whose tiles stay in L2 together with two panels: this one, and the next on its way in. Each block
// streams all weights: 32 rows of products hide 2 KB in 64 cycles, and 24 GB/s from the last-level cache are
// about 9 bytes a cycle, so up to 110 rows would wait for weights.
inline std::int64_t amx_block_rows(std::int64_t k) {
  const std::int64_t row_bytes = amx_steps(k) * kTileInputs * 2;
  const std::int64_t fit = l2_bytes() * 3 / 4 / (row_bytes > 0 ? row_bytes : 1) - 2 * kPanelWidth;
  return fit < 64 ? 64 : fit / 32 * 32;
}

// Rows of x, as tiles.
struct AmxRows {
  const std::uint16_t* tiles;  // [ceil(rows / 16)][k_steps][16][32]
  std::int64_t rows;
};

// One weight as the loops want it.
struct AmxLayer {
  const char* panels;  // [ceil(n / 32)][k_steps][16][32][2]
  std::int64_t n, k;
  const float* bias;  // [round_up(n, 32)], zero where there is none
  Activation activation;
};

// The bias is copied to `scratch` where it must be padded.
AmxLayer amx_layer(const Packed& weight, Activation activation, Scratch& scratch);

// Where results go: the output columns of each panel, or, as bf16 tiles, to what the next layer reads.
struct AmxTarget {
  const Windows* windows = nullptr;
  char* y = nullptr;  // at the first row
  std::int64_t y_stride = 0;
  const char* residual = nullptr;
  std::int64_t residual_stride = 0;
  Element element = Element::fp32;

  std::uint16_t* tiles = nullptr;  // [ceil(rows / 16)][k_steps][16][32]; used where windows is null
  std::int64_t k_steps = 0;
};

// target = act(x weight^T + bias), or with a gate act(gate's sums) * (x weight^T + bias), for some panels.
// `again`: the first of them will be needed once more after this.
void amx_multiply(const AmxRows& x, const AmxLayer& layer, const AmxLayer* gate, Range panels,
                  const AmxTarget& target, bool again);

}  // namespace prunekern
