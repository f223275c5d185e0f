// Norms of rows.
#pragma once

#include <cstdint>

#include "prunekern/isa.h"

namespace prunekern {

// y = weight * (x / sqrt(mean(x^2) + eps)), row by row; a row of zeros gives zeros where eps > 0. All fp32.
struct NormCall {
  std::int64_t rows = 0, n = 0;
  const float* x = nullptr;  // [rows, n], rows x_stride apart
  std::int64_t x_stride = 0;
  const float* weight = nullptr;  // [n]
  float eps = 0.0f;
  float* y = nullptr;  // [rows, n], contiguous; may be x
  int threads = 1;
};

void rms_norm(const NormCall& call);

// y = weight * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) + bias, row by row. All fp32.
struct LayerNormCall {
  std::int64_t rows = 0, n = 0;
  const float* x = nullptr;  // [rows, n], rows x_stride apart
  std::int64_t x_stride = 0;
  const float* weight = nullptr;  // [n]
  const float* bias = nullptr;    // [n], or null: none
  float eps = 0.0f;
  float* y = nullptr;  // [rows, n], contiguous; may be x
  int threads = 1;
};

void layer_norm(Isa isa, const LayerNormCall& call);
inline void layer_norm(const LayerNormCall& call) { layer_norm(active_isa(), call); }

}  // namespace prunekern
