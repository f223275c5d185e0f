// An encoder block with its norms before as one call: between its parts Python asks the same questions
// whatever the number of tokens, and writes what the next part reads to memory of its own.
#include "prunekern/prenorm_block.h"

#include "loops/scratch.h"
#include "ops/block_parts.h"
#include "prunekern/norm.h"
#include "prunekern/rotary.h"

namespace prunekern {
namespace {

void norm(Isa isa, const PrenormBlockCall& call, const NormOf& norm, const float* x, std::int64_t x_stride,
          float* y) {
  layer_norm(isa, {call.batch * call.tokens, call.hidden, x, x_stride, norm.weight, norm.bias, norm.eps, y,
                   call.threads});
}

// Queries and keys stand side by side, and are turned where they stand.
void turn(const PrenormBlockCall& call, float* projected) {
  RotaryCall rotary;
  rotary.batch = call.batch;
  rotary.tokens = call.tokens;
  rotary.heads = call.heads;
  rotary.arrays = 2;
  rotary.first = call.qk_first;
  rotary.angle = call.angle;
  rotary.angles = call.angles;
  rotary.x = rotary.y = projected;
  rotary.x_stride = rotary.y_stride = call.qkv.n;
  rotary.x_batch_stride = rotary.y_batch_stride = call.tokens * call.qkv.n;
  rotary.cos = call.cos;
  rotary.cos_batch_stride = call.cos_batch_stride;
  rotary.cos_stride = call.cos_stride;
  rotary.sin = call.sin;
  rotary.sin_batch_stride = call.sin_batch_stride;
  rotary.sin_stride = call.sin_stride;
  rotary.threads = call.threads;
  rotate_pairs(rotary);
}

void attend(Isa isa, const PrenormBlockCall& call, const float* projected, float* context) {
  AttentionCall attention = block::attention(call, projected, context);
  attention.window = call.window;
  compact_attention(isa, attention);
}

}  // namespace

void prenorm_block(Isa isa, const PrenormBlockCall& call) {
  block::check("prenorm_block", call);
  const std::int64_t rows = call.batch * call.tokens;
  if (rows == 0) return;
  static thread_local Scratch scratch;
  auto floats = [&](std::int64_t channels) { return round_up(rows * channels, kLine / 4); };
  float* projected = scratch.get<float>(floats(call.qkv.n) + floats(call.o.k) + floats(call.hidden));
  float* context = projected + floats(call.qkv.n);
  float* normed = context + floats(call.o.k);

  LinearCall qkv = block::product(rows, call.qkv, call.x, projected, call.threads);
  qkv.x_stride = call.x_stride;
  if (call.norm.weight != nullptr) {
    norm(isa, call, call.norm, call.x, call.x_stride, normed);
    qkv.x = normed;
    qkv.x_stride = call.hidden;
  }
  compact_linear(isa, qkv);
  turn(call, projected);
  attend(isa, call, projected, context);
  compact_linear(isa, block::into_residual(call, rows, context, call.y));
  norm(isa, call, call.mlp_norm, call.y, call.hidden, normed);
  MlpCall mlp = block::mlp(call, rows, normed, call.y);
  mlp.gate = call.gate;
  compact_mlp(isa, mlp);
}

}  // namespace prunekern
