// Attention by content and by relative position (DeBERTa), heads of different widths: nothing is padded.
#pragma once

#include <cstdint>

#include "prunekern/isa.h"

namespace prunekern {

// For each sequence and head h: y_h = softmax(scale logits_h) v_h over the keys that token_mask allows, with
//   logits[i, j] = q_i . k_j + q_i . pos_key[tokens - 1 + i - j] + k_j . pos_query[tokens - 1 + i - j]
// A head without query/key channels averages its values over those keys. A query that is no token averages
// all values, those of padding, too, which must be finite. q, k, v, positions and y are fp32.
struct DisentangledCall {
  std::int64_t batch = 0, tokens = 0, heads = 0;
  const std::int64_t* qk_first = nullptr;  // [heads + 1]: head h has channels qk_first[h] .. qk_first[h + 1]
  const std::int64_t* v_first = nullptr;   // [heads + 1]: the same for values
  const float* q = nullptr;                // [batch, tokens, qk_first[heads]]
  const float* k = nullptr;                // [batch, tokens, qk_first[heads]]
  const float* v = nullptr;                // [batch, tokens, v_first[heads]]
  float* y = nullptr;                      // [batch, tokens, v_first[heads]]
  // Of one sequence, and of one token; channels are contiguous.
  std::int64_t q_batch_stride = 0, q_stride = 0, k_batch_stride = 0, k_stride = 0;
  std::int64_t v_batch_stride = 0, v_stride = 0, y_batch_stride = 0, y_stride = 0;
  const float* pos_key = nullptr;    // [2 tokens - 1, qk_first[heads]], or null: the term is not there
  const float* pos_query = nullptr;  // the same
  std::int64_t pos_key_stride = 0, pos_query_stride = 0;
  const bool* token_mask = nullptr;  // [batch, tokens], true: is a token; null: all are
  std::int64_t token_mask_stride = 0;
  float scale = 1.0f;
  // As in AttentionCall; positions are rounded, too.
  Arithmetic arithmetic = Arithmetic::fp32;
  int threads = 1;
};

void disentangled_attention(Isa isa, const DisentangledCall& call);
inline void disentangled_attention(const DisentangledCall& call) {
  disentangled_attention(active_isa(), call);
}

}  // namespace prunekern
