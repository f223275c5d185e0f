// An encoder block as one call: between its parts Python asks the same questions whatever the number of
// tokens.
#include "prunekern/encoder_block.h"

#include <stdexcept>
#include <string>

#include "loops/scratch.h"
#include "ops/block_parts.h"
#include "prunekern/norm.h"

namespace prunekern {
namespace {

void check(const EncoderBlockCall& call) {
  block::check("encoder_block", call);
  if (call.starts == nullptr) return;
  auto fail = [](const std::string& message) { throw std::invalid_argument("encoder_block: " + message); };
  if (call.key_mask != nullptr || call.bias != nullptr) fail("starts leave no keys to forbid, and no bias");
  for (std::int64_t s = 0; s < call.batch; ++s)
    if (call.starts[0] != 0 || call.starts[s] > call.starts[s + 1])
      fail("starts must ascend from 0 (got " + std::to_string(call.starts[s + 1]) + " after " +
           std::to_string(call.starts[s]) + ")");
}

void norm_in_place(Isa isa, const EncoderBlockCall& call, const NormOf& norm, float* y) {
  layer_norm(isa,
             {rows_of(call), call.hidden, y, call.hidden, norm.weight, norm.bias, norm.eps, y, call.threads});
}

void attend(Isa isa, const EncoderBlockCall& call, const float* projected, float* context) {
  AttentionCall attention = block::attention(call, projected, context);
  attention.bias = call.bias;
  attention.bias_head = call.bias_head;
  if (call.starts == nullptr) {
    compact_attention(isa, attention);
    return;
  }
  attention.batch = 1;
  for (std::int64_t s = 0; s < call.batch; ++s) {
    const std::int64_t first = call.starts[s];
    AttentionCall one = attention;
    one.queries = one.keys = call.starts[s + 1] - first;
    one.q += first * one.q_stride;
    one.k += first * one.k_stride;
    one.v += first * one.v_stride;
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

  LinearCall qkv = block::product(rows, call.qkv, call.x, projected, call.threads);
  qkv.x_stride = call.x_stride;
  compact_linear(isa, qkv);
  attend(isa, call, projected, context);
  compact_linear(isa, block::into_residual(call, rows, context, attended));
  norm_in_place(isa, call, call.norm, attended);
  compact_mlp(isa, block::mlp(call, rows, attended, attended));
  norm_in_place(isa, call, call.mlp_norm, call.y);
}

}  // namespace prunekern
