// A whole encoder block whose norms come before its linears, with rotary positions and a gated FFN:
// ModernBERT's.
#pragma once

#include <cstdint>

#include "prunekern/encoder_block.h"

namespace prunekern {

// q, k, v = qkv layer_norm(x); a = x + o attention(turned q, turned k, v); n = layer_norm(a);
// y = a + down (act(gate n) * up n). The arguments are those of compact_linear, rotate_pairs,
// compact_attention, compact_mlp and layer_norm, and so are the numbers. All fp32 but the weights.
struct PrenormBlockCall {
  std::int64_t batch = 0, tokens = 0, hidden = 0;
  const float* x = nullptr;  // [batch * tokens, hidden], rows x_stride apart
  std::int64_t x_stride = 0;
  NormOf norm;                          // weight null: the first linear reads x as it is
  Packed qkv;                           // makes C query, C key and D value channels
  const std::int64_t* angle = nullptr;  // [C / 2]: which of `angles` turns each pair
  std::int64_t angles = 0;
  const float* cos = nullptr;  // [batch, tokens, angles]
  const float* sin = nullptr;
  std::int64_t cos_batch_stride = 0, cos_stride = 0, sin_batch_stride = 0, sin_stride = 0;
  Packed o;                                 // reads D channels
  const std::int64_t* out_index = nullptr;  // [o.n]: the channels of a that o adds to; null: all
  std::int64_t heads = 0;
  const std::int64_t* qk_first = nullptr;  // [heads + 1]: C = qk_first[heads]
  const std::int64_t* v_first = nullptr;   // [heads + 1]: D = v_first[heads]
  const bool* key_mask = nullptr;          // [batch, tokens], true: may be read; null: all
  std::int64_t key_mask_stride = 0;
  std::int64_t window = -1;  // a token sees those at most so far from it; negative: all
  float scale = 1.0f;
  Arithmetic arithmetic = Arithmetic::fp32;  // of attention's products
  NormOf mlp_norm;
  Packed up, gate, down;
  const std::int64_t* mlp_out_index = nullptr;  // [down.n]: the channels of y that down adds to; null: all
  Activation activation = Activation::gelu;
  float* y = nullptr;  // [batch * tokens, hidden], contiguous; not x
  int threads = 1;
};

void prenorm_block(Isa isa, const PrenormBlockCall& call);
inline void prenorm_block(const PrenormBlockCall& call) { prenorm_block(active_isa(), call); }

}  // namespace prunekern
