// A whole encoder block whose norms come after its residual additions: BERT's, DistilBERT's, MPNet's.
#pragma once

#include <cstdint>

#include "prunekern/mlp.h"

namespace prunekern {

// The weight and bias of a layer norm, [hidden] each; bias null: none.
struct NormOf {
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0.0f;
};

// q, k, v = qkv x; a = layer_norm(x + o attention(q, k, v)); y = layer_norm(a + down act(up a)). The
// arguments are those of compact_linear, compact_attention, compact_mlp and layer_norm, and so are the
// numbers. All fp32 but the weights.
struct EncoderBlockCall {
  std::int64_t batch = 0, tokens = 0, hidden = 0;
  // [batch + 1]: sequence s has the rows starts[s] .. starts[s + 1], as many as it likes, and all its keys
  // may be read; there is neither padding nor a bias then. null: every sequence has `tokens` rows.
  const std::int64_t* starts = nullptr;
  const float* x = nullptr;  // [rows, hidden], rows x_stride apart
  std::int64_t x_stride = 0;
  Packed qkv;                               // makes C query, C key and D value channels
  Packed o;                                 // reads D channels
  const std::int64_t* out_index = nullptr;  // [o.n]: the channels of a that o makes; null: all
  std::int64_t heads = 0;
  const std::int64_t* qk_first = nullptr;  // [heads + 1]: C = qk_first[heads]
  const std::int64_t* v_first = nullptr;   // [heads + 1]: D = v_first[heads]
  const bool* key_mask = nullptr;          // [batch, tokens], true: may be read; null: all
  std::int64_t key_mask_stride = 0;
  const float* bias = nullptr;              // [matrices, tokens, tokens], added to the logits; null: none
  const std::int64_t* bias_head = nullptr;  // [heads]: the matrix of each head
  float scale = 1.0f;
  Arithmetic arithmetic = Arithmetic::fp32;  // of attention's products
  NormOf norm;
  Packed up, down;
  const std::int64_t* mlp_out_index = nullptr;  // [down.n]: the channels of y that down makes; null: all
  Activation activation = Activation::gelu;
  NormOf mlp_norm;
  float* y = nullptr;  // [rows, hidden], contiguous; may be x, where that is, too
  int threads = 1;
};

inline std::int64_t rows_of(const EncoderBlockCall& call) {
  return call.starts == nullptr ? call.batch * call.tokens : call.starts[call.batch];
}

void encoder_block(Isa isa, const EncoderBlockCall& call);
inline void encoder_block(const EncoderBlockCall& call) { encoder_block(active_isa(), call); }

}  // namespace prunekern
