// Rotary positions on heads that keep rotary pairs of their own.
#pragma once

#include <cstdint>

namespace prunekern {

// Every pair (a, b) of a head turned by its angle: (a cos - b sin, b cos + a sin). Key/value head h has
// channels first[h] .. first[h + 1] of a key, first halves of its pairs before second halves; of a query it
// has shared_by times as many, query head by query head. All fp32.
// A token may have several arrays of such heads, one after the other (queries, then keys), turned alike.
struct RotaryCall {
  std::int64_t batch = 0, tokens = 0, heads = 0, shared_by = 1, arrays = 1;
  const std::int64_t* first = nullptr;  // [heads + 1], even
  const std::int64_t* angle = nullptr;  // [first[heads] / 2]: which of `angles` turns each pair
  std::int64_t angles = 0;
  const float* x = nullptr;    // [batch, tokens, arrays * shared_by * first[heads]]
  const float* cos = nullptr;  // [batch, tokens, angles]
  const float* sin = nullptr;
  float* y = nullptr;  // [batch, tokens, arrays * shared_by * first[heads]]; may be x, with its strides
  // Of one sequence, and of one token; channels are contiguous.
  std::int64_t x_batch_stride = 0, x_stride = 0, cos_batch_stride = 0, cos_stride = 0;
  std::int64_t sin_batch_stride = 0, sin_stride = 0, y_batch_stride = 0, y_stride = 0;
  int threads = 1;
};

void rotate_pairs(const RotaryCall& call);

}  // namespace prunekern
