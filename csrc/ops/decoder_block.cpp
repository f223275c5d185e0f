// A decoder block as one call: between the weights of two layers, which have just gone through the caches,
// every line of Python comes from memory. A block of SmolLM2-135M's shape (bf16 weights, one token) took 500
// us by its parts, 310 as one call of 270.
#include "prunekern/decoder_block.h"

#include "loops/scratch.h"
#include "prunekern/norm.h"

namespace prunekern {

void decoder_block(Isa isa, const DecoderBlockCall& call) {
  const AttentionBlockCall& attention = call.attention;
  static thread_local Scratch scratch;
  MlpCall mlp;
  mlp.m = attention.batch * attention.tokens;
  mlp.in_features = mlp.n_out = mlp.x_stride = mlp.y_stride = mlp.residual_stride = attention.hidden;
  mlp.up = call.up;
  mlp.gate = call.gate;
  mlp.down = call.down;
  mlp.out_index = call.out_index;
  mlp.activation = call.activation;
  mlp.threads = attention.threads;
  MlpCall empty = mlp;  // refuses what the whole would refuse, before the cache is written
  empty.m = 0;
  compact_mlp(isa, empty);

  attention_block(isa, attention);
  float* normed = scratch.get<float>(mlp.m * attention.hidden);
  rms_norm({mlp.m, attention.hidden, attention.y, attention.hidden, call.norm, call.eps, normed,
            attention.threads});
  mlp.x = normed;
  mlp.y = attention.y;
  mlp.residual = attention.y;
  compact_mlp(isa, mlp);
}

}  // namespace prunekern
