// An encoder block with its norms before as one call: between its parts Python asks the same questions
// whatever the number of tokens, and writes what the next part reads to memory of its own.
#include "prunekern/prenorm_block.h"

#include <stdexcept>
#include <string>

#include "loops/scratch.h"
#include "prunekern/attention.h"
#include "prunekern/norm.h"
#include "prunekern/rotary.h"

namespace prunekern {
namespace {

// What the parts do not see: that they fit one another.
void check(const PrenormBlockCall& call) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("prenorm_block: " + message); };
  if (call.batch < 0 || call.tokens < 0 || call.heads < 1)
    fail("sizes must not be negative, and heads not zero");
  const std::int64_t keys = call.qk_first[call.heads], values = call.v_first[call.heads];
  auto fits = [&](const char* name, const Packed& weight, std::int64_t n, std::int64_t k) {
    if (weight.n != n || weight.k != k)
      fail(std::string(name) + " must make " + std::to_string(n) + " channels of " + std::to_string(k) +
           " (got " + std::to_string(weight.n) + " of " + std::to_string(weight.k) + ")");
  };
  fits("qkv", call.qkv, 2 * keys + values, call.hidden);
  fits("o", call.o, call.o.n, values);
}

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
  const std::int64_t keys = call.qk_first[call.heads], stride = call.qkv.n;
  AttentionCall attention;
  attention.batch = call.batch;
  attention.queries = attention.keys = call.tokens;
  attention.heads = call.heads;
  attention.qk_first = call.qk_first;
  attention.v_first = call.v_first;
  attention.q = projected;
  attention.k = projected + keys;
  attention.v = projected + 2 * keys;
  attention.q_stride = attention.k_stride = attention.v_stride = stride;
  attention.q_batch_stride = attention.k_batch_stride = attention.v_batch_stride = call.tokens * stride;
  attention.y = context;
  attention.y_stride = call.o.k;
  attention.y_batch_stride = call.tokens * call.o.k;
  attention.key_mask = call.key_mask;
  attention.key_mask_stride = call.key_mask_stride;
  attention.window = call.window;
  attention.scale = call.scale;
  attention.arithmetic = call.arithmetic;
  attention.threads = call.threads;
  compact_attention(isa, attention);
}

}  // namespace

void prenorm_block(Isa isa, const PrenormBlockCall& call) {
  check(call);
  const std::int64_t rows = call.batch * call.tokens;
  if (rows == 0) return;
  static thread_local Scratch scratch;
  auto floats = [&](std::int64_t channels) { return round_up(rows * channels, kLine / 4); };
  float* projected = scratch.get<float>(floats(call.qkv.n) + floats(call.o.k) + floats(call.hidden));
  float* context = projected + floats(call.qkv.n);
  float* normed = context + floats(call.o.k);

  LinearCall qkv;
  qkv.m = rows;
  qkv.in_features = call.hidden;
  qkv.x = call.x;
  qkv.x_stride = call.x_stride;
  if (call.norm.weight != nullptr) {
    norm(isa, call, call.norm, call.x, call.x_stride, normed);
    qkv.x = normed;
    qkv.x_stride = call.hidden;
  }
  qkv.weight = call.qkv;
  qkv.y = projected;
  qkv.n_out = qkv.y_stride = call.qkv.n;
  qkv.threads = call.threads;
  compact_linear(isa, qkv);

  turn(call, projected);
  attend(isa, call, projected, context);

  LinearCall o;
  o.m = rows;
  o.in_features = o.x_stride = call.o.k;
  o.x = context;
  o.weight = call.o;
  o.out_index = call.out_index;
  o.residual = call.x;
  o.residual_stride = call.x_stride;
  o.y = call.y;
  o.n_out = o.y_stride = call.hidden;
  o.threads = call.threads;
  compact_linear(isa, o);

  norm(isa, call, call.mlp_norm, call.y, call.hidden, normed);
  MlpCall mlp;
  mlp.m = rows;
  mlp.in_features = mlp.n_out = mlp.x_stride = mlp.y_stride = mlp.residual_stride = call.hidden;
  mlp.x = normed;
  mlp.residual = mlp.y = call.y;
  mlp.up = call.up;
  mlp.gate = call.gate;
  mlp.down = call.down;
  mlp.out_index = call.mlp_out_index;
  mlp.activation = call.activation;
  mlp.threads = call.threads;
  compact_mlp(isa, mlp);
}

}  // namespace prunekern
