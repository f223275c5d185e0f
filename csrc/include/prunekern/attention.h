// Attention of an encoder or a decoder whose heads have different widths: nothing is padded.
#pragma once

#include <cstdint>

#include "prunekern/isa.h"

namespace prunekern {

// For each sequence and head h: y_h = softmax(scale q_h k_h^T) v_h over the keys that key_mask allows.
// A head without query/key channels averages its values over those keys; a sequence without any allowed key
// gives zeros. q, k, v and y are fp32.
//
// Grouped queries: every key/value head h is read by `shared_by` query heads; in q and y these stand side by
// side, at shared_by times where the key/value head stands.
// Bias: what is added to the logits, scale behind it; head h reads the matrix bias_head[h]. Only where
// shared_by is 1.
// Causal: the queries are those of the last tokens; query i sees keys 0 .. keys - queries + i.
// With a window every token is a query and a key; query i sees keys i - window .. i + window.
struct AttentionCall {
  std::int64_t batch = 0, queries = 0, keys = 0, heads = 0;
  std::int64_t shared_by = 1;
  bool causal = false;
  std::int64_t window = -1;                // negative: none
  const std::int64_t* qk_first = nullptr;  // [heads + 1]: head h has channels qk_first[h] .. qk_first[h + 1]
  const std::int64_t* v_first = nullptr;   // [heads + 1]: the same for values
  const float* q = nullptr;                // [batch, queries, shared_by * qk_first[heads]]
  const float* k = nullptr;                // [batch, keys, qk_first[heads]]
  const float* v = nullptr;                // [batch, keys, v_first[heads]]
  float* y = nullptr;                      // [batch, queries, shared_by * v_first[heads]]
  // Of one sequence, and of one token; channels are contiguous.
  std::int64_t q_batch_stride = 0, q_stride = 0, k_batch_stride = 0, k_stride = 0;
  std::int64_t v_batch_stride = 0, v_stride = 0, y_batch_stride = 0, y_stride = 0;
  const bool* key_mask = nullptr;  // [batch, keys], true: may be read; null: all
  std::int64_t key_mask_stride = 0;
  const float* bias = nullptr;              // [matrices, queries, keys], contiguous; null: none
  const std::int64_t* bias_head = nullptr;  // [heads]
  float scale = 1.0f;
  // bf16: q and k, powers and v are rounded to it and multiplied so, where the isa does that faster and there
  // is more than one query; sums and the softmax stay fp32. Anything else: fp32.
  Arithmetic arithmetic = Arithmetic::fp32;
  int threads = 1;
};

void compact_attention(Isa isa, const AttentionCall& call);
inline void compact_attention(const AttentionCall& call) { compact_attention(active_isa(), call); }

}  // namespace prunekern
