// An encoder block as one call: between its parts Python asks the same questions whatever the number of
// tokens.
#include "prunekern/encoder_block.h"

#include <stdexcept>
#include <string>

#include "loops/scratch.h"
#include "prunekern/attention.h"
#include "prunekern/norm.h"

namespace prunekern {
namespace {

// What the parts do not see: that they fit one another.
void check(const EncoderBlockCall& call) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("encoder_block: " + message); };
  if (call.batch < 0 || call.tokens < 0 || call.heads < 1)
    fail("sizes must not be negative, and heads not zero");
  if (call.starts != nullptr) {
    if (call.key_mask != nullptr || call.bias != nullptr) fail("starts leave no keys to forbid, and no bias");
    for (std::int64_t s = 0; s < call.batch; ++s)
      if (call.starts[0] != 0 || call.starts[s] > call.starts[s + 1])
        fail("starts must ascend from 0 (got " + std::to_string(call.starts[s + 1]) + " after " +
             std::to_string(call.starts[s]) + ")");
  }
  const std::int64_t keys = call.qk_first[call.heads], values = call.v_first[call.heads];
  auto fits = [&](const char* name, const Packed& weight, std::int64_t n, std::int64_t k) {
    if (weight.n != n || weight.k != k)
      fail(std::string(name) + " must make " + std::to_string(n) + " channels of " + std::to_string(k) +
           " (got " + std::to_string(weight.n) + " of " + std::to_string(weight.k) + ")");
  };
  fits("qkv", call.qkv, 2 * keys + values, call.hidden);
  fits("o", call.o, call.o.n, values);
}

void norm_in_place(Isa isa, const EncoderBlockCall& call, const NormOf& norm, float* y) {
  layer_norm(isa,
             {rows_of(call), call.hidden, y, call.hidden, norm.weight, norm.bias, norm.eps, y, call.threads});
}

void attend(Isa isa, const EncoderBlockCall& call, const float* projected, float* context) {
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
  attention.bias = call.bias;
  attention.bias_head = call.bias_head;
  attention.scale = call.scale;
  attention.arithmetic = call.arithmetic;
  attention.threads = call.threads;
  if (call.starts == nullptr) {
    compact_attention(isa, attention);
    return;
  }
  attention.batch = 1;
  for (std::int64_t s = 0; s < call.batch; ++s) {
    const std::int64_t first = call.starts[s];
    AttentionCall one = attention;
    one.queries = one.keys = call.starts[s + 1] - first;
    one.q += first * stride;
    one.k += first * stride;
    one.v += first * stride;
    one.y += first * call.o.k;
    compact_attention(isa, one);
  }
}

}  // namespace

void encoder_block(Isa isa, const EncoderBlockCall& call) {
  check(call);
  const std::int64_t rows = rows_of(call);
  if (rows == 0) return;
  static thread_local Scratch scratch;
  auto floats = [&](std::int64_t channels) { return round_up(rows * channels, kLine / 4); };
  float* projected = scratch.get<float>(floats(call.qkv.n) + floats(call.o.k) + floats(call.hidden));
  float* context = projected + floats(call.qkv.n);
  float* attended = context + floats(call.o.k);

  LinearCall qkv;
  qkv.m = rows;
  qkv.in_features = call.hidden;
  qkv.x = call.x;
  qkv.x_stride = call.x_stride;
  qkv.weight = call.qkv;
  qkv.y = projected;
  qkv.n_out = qkv.y_stride = call.qkv.n;
  qkv.threads = call.threads;
  compact_linear(isa, qkv);

  attend(isa, call, projected, context);

  LinearCall o;
  o.m = rows;
  o.in_features = o.x_stride = call.o.k;
  o.x = context;
  o.weight = call.o;
  o.out_index = call.out_index;
  o.residual = call.x;
  o.residual_stride = call.x_stride;
  o.y = attended;
  o.n_out = o.y_stride = call.hidden;
  o.threads = call.threads;
  compact_linear(isa, o);
  norm_in_place(isa, call, call.norm, attended);

  MlpCall mlp;
  mlp.m = rows;
  mlp.in_features = mlp.n_out = mlp.x_stride = mlp.y_stride = mlp.residual_stride = call.hidden;
  mlp.x = mlp.residual = attended;
  mlp.y = call.y;
  mlp.up = call.up;
  mlp.down = call.down;
  mlp.out_index = call.mlp_out_index;
  mlp.activation = call.activation;
  mlp.threads = call.threads;
  compact_mlp(isa, mlp);
  norm_in_place(isa, call, call.mlp_norm, call.y);
}

}  // namespace prunekern
