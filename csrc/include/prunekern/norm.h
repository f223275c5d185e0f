// Root mean square norm of rows.
#pragma once

#include <cstdint>

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

}  // namespace prunekern
