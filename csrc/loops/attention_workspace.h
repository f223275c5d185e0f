// Memory of one thread for one head of attention.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernel.h"
#include "kernels/product.h"
#include "loops/products.h"
#include "loops/scratch.h"

namespace prunekern {

constexpr std::int64_t kKeyBlock = 256;  // 14 rows of scores and of powers: 28 of 48 KB of L1

// In floats.
struct Workspace {
  float *keys, *values, *q, *scores, *p, *sums;
  char *key_pairs, *value_pairs, *q_tile, *p_tile;  // of bf16 products
  std::int64_t q_stride, p_stride;

  Workspace(const Kernels& kernel, const Product* pairs, std::int64_t n, std::int64_t qk, std::int64_t v,
            bool is_packed, Scratch& scratch) {
    const std::int64_t padded = round_up(n, kernel.width), block = std::min(padded, kKeyBlock);
    q_stride = odd_lines(qk);
    p_stride = odd_lines(block);
    const std::int64_t v_floats = round_up(v, kernel.width);
    const std::int64_t sizes[] = {is_packed ? padded * qk : 0,
                                  is_packed ? n * v_floats : 0,
                                  kernel.rows * q_stride,
                                  kernel.rows * block,
                                  kernel.rows * p_stride,
                                  kernel.rows * (is_packed ? kernel.width : v_floats),
                                  pairs == nullptr ? 0 : padded / kernel.width * panel_floats(*pairs, qk),
                                  pairs == nullptr ? 0 : v_floats / kernel.width * panel_floats(*pairs, n),
                                  pairs == nullptr ? 0 : row_tile_bytes(*pairs, qk) / 4,
                                  pairs == nullptr ? 0 : row_tile_bytes(*pairs, block) / 4};
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += round_up(size, kLine / 4);
    float* next = scratch.get<float>(total);
    float *of_keys, *of_values, *of_q, *of_p;
    float** parts[] = {&keys, &values, &q, &scores, &p, &sums, &of_keys, &of_values, &of_q, &of_p};
    for (int i = 0; i < 10; ++i) {
      *parts[i] = next;
      next += round_up(sizes[i], kLine / 4);
    }
    key_pairs = reinterpret_cast<char*>(of_keys);
    value_pairs = reinterpret_cast<char*>(of_values);
    q_tile = reinterpret_cast<char*>(of_q);
    p_tile = reinterpret_cast<char*>(of_p);
  }
  static std::int64_t panel_floats(const Product& pairs, std::int64_t k) {
    return steps(pairs, k) * pairs.panel_step_bytes / 4;
  }
};

}  // namespace prunekern
