// The attention half of a decoder block, for a few new tokens after those in a cache.
#pragma once

#include <cstdint>

#include "prunekern/linear.h"

namespace prunekern {

// q, k, v = qkv rms_norm(x); q and k turned by their positions; k and v written into the cache after the
// tokens it holds; y = x + o attention(q, all keys, all values), causal, no key forbidden. The arguments are
// those of rms_norm, compact_linear, rotate_pairs and compact_attention, and so are the numbers. All fp32 but
// the weights.
struct AttentionBlockCall {
  std::int64_t batch = 0, tokens = 0, hidden = 0;
  std::int64_t past = 0;     // tokens of each sequence in the cache
  const float* x = nullptr;  // [batch * tokens, hidden], rows x_stride apart
  std::int64_t x_stride = 0;
  const float* norm = nullptr;  // [hidden]
  float eps = 0.0f;
  Packed qkv;                               // makes shared_by * C query, C key and D value channels
  Packed o;                                 // reads shared_by * D channels
  const std::int64_t* out_index = nullptr;  // [o.n]: the channels of y that o makes; null: all
  std::int64_t heads = 0, shared_by = 1;
  const std::int64_t* qk_first = nullptr;  // [heads + 1]: C = qk_first[heads]
  const std::int64_t* v_first = nullptr;   // [heads + 1]: D = v_first[heads]
  const float* cos = nullptr;              // [batch, tokens, angles]
  const float* sin = nullptr;
  std::int64_t cos_batch_stride = 0, cos_stride = 0, sin_batch_stride = 0, sin_stride = 0;
  const std::int64_t* angle = nullptr;  // [C / 2]
  std::int64_t angles = 0;
  float* keys = nullptr;    // [batch, past + tokens, C]; of the first `past` only read
  float* values = nullptr;  // [batch, past + tokens, D]
  std::int64_t k_batch_stride = 0, k_stride = 0, v_batch_stride = 0, v_stride = 0;
  float scale = 1.0f;
  float* y = nullptr;  // [batch * tokens, hidden], contiguous
  int threads = 1;
};

void attention_block(Isa isa, const AttentionBlockCall& call);
inline void attention_block(const AttentionBlockCall& call) { attention_block(active_isa(), call); }

}  // namespace prunekern
