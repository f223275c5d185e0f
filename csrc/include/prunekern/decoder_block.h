// A whole decoder block, for a few new tokens after those in a cache.
#pragma once

#include "prunekern/attention_block.h"
#include "prunekern/mlp.h"

namespace prunekern {

// attention_block, and to its y added compact_mlp of rms_norm of it.
struct DecoderBlockCall {
  AttentionBlockCall attention;  // its y is the block's
  const float* norm = nullptr;   // [hidden]
  float eps = 0.0f;
  Packed up, gate, down;
  const std::int64_t* out_index = nullptr;  // [down.n]: the channels of y that down makes; null: all
  Activation activation = Activation::silu;
};

void decoder_block(Isa isa, const DecoderBlockCall& call);
inline void decoder_block(const DecoderBlockCall& call) { decoder_block(active_isa(), call); }

}  // namespace prunekern
