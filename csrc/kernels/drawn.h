// What a product draws into the caches on its way.
#pragma once

#include "kernels/product.h"

namespace prunekern {

// D: the struct of the product, which makes this its file's own.
template <class D>
struct Drawn {
  const char *next, *y, *residual;
  int rows_left;

  Drawn(const ProductArgs& args, int rows)
      : next(args.next_weights),
        y(args.y),
        residual(args.residual),
        rows_left(args.row_lines > 0 ? rows : 0) {}

  // At every step of k.
  inline __attribute__((always_inline)) void step(const ProductArgs& args) {
    constexpr int kLineBytes = 64;
    for (std::int64_t i = 0; i < args.next_lines; ++i, next += kLineBytes) __builtin_prefetch(next, 0, 2);
    // A store that misses waits for its line, and the stores behind it wait too. One row at a time.
    if (rows_left-- > 0) {
      for (std::int64_t i = 0; i < args.row_lines; ++i) __builtin_prefetch(y + i * kLineBytes, 1, 3);
      y += args.y_step;
      if (residual != nullptr) {
        for (std::int64_t i = 0; i < args.row_lines; ++i) __builtin_prefetch(residual + i * kLineBytes, 0, 3);
        residual += args.residual_step;
      }
    }
  }
};

}  // namespace prunekern
