// The attention half of a decoder block as one call; decoder_block.cpp says why.
#include "prunekern/attention_block.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "loops/scratch.h"
#include "ops/block_parts.h"
#include "prunekern/norm.h"
#include "prunekern/rotary.h"

namespace prunekern {
namespace {

// All before anything is written: a call that is refused leaves the cache as it was.
void check(const AttentionBlockCall& call) {
  auto fail = [](const std::string& message) { throw std::invalid_argument("attention_block: " + message); };
  if (call.batch < 0 || call.tokens < 0 || call.past < 0 || call.heads < 0)
    fail("sizes must not be negative");
  if (call.shared_by < 1) fail("shared_by must be at least 1 (got " + std::to_string(call.shared_by) + ")");
  if (!std::isfinite(call.scale)) fail("scale must be finite (got " + std::to_string(call.scale) + ")");
  if (!std::isfinite(call.eps) || call.eps < 0.0f)
    fail("eps must be finite and not negative (got " + std::to_string(call.eps) + ")");
  const std::int64_t keys = call.qk_first[call.heads], values = call.v_first[call.heads];
  if (call.qkv.k != call.hidden)
    fail("qkv reads " + std::to_string(call.qkv.k) + " inputs, x has " + std::to_string(call.hidden));
  if (call.qkv.n != (call.shared_by + 1) * keys + values)
    fail("qkv must make " + std::to_string((call.shared_by + 1) * keys + values) + " channels (got " +
         std::to_string(call.qkv.n) + ")");
  if (call.o.k != call.shared_by * values)
    fail("o must read " + std::to_string(call.shared_by * values) + " channels (got " +
         std::to_string(call.o.k) + ")");
}

// Queries or keys: x [batch * tokens, ..] from a row of the projection on, to y.
void turn(const AttentionBlockCall& call, std::int64_t shared_by, const float* x, float* y,
          std::int64_t y_batch_stride, std::int64_t y_stride) {
  RotaryCall rotary;
  rotary.batch = call.batch;
  rotary.tokens = call.tokens;
  rotary.heads = call.heads;
  rotary.shared_by = shared_by;
  rotary.first = call.qk_first;
  rotary.angle = call.angle;
  rotary.angles = call.angles;
  rotary.x = x;
  rotary.x_batch_stride = call.tokens * call.qkv.n;
  rotary.x_stride = call.qkv.n;
  rotary.cos = call.cos;
  rotary.cos_batch_stride = call.cos_batch_stride;
  rotary.cos_stride = call.cos_stride;
  rotary.sin = call.sin;
  rotary.sin_batch_stride = call.sin_batch_stride;
  rotary.sin_stride = call.sin_stride;
  rotary.y = y;
  rotary.y_batch_stride = y_batch_stride;
  rotary.y_stride = y_stride;
  rotary.threads = call.threads;
  rotate_pairs(rotary);
}

void attend(Isa isa, const AttentionBlockCall& call, const float* q, float* y) {
  const std::int64_t channels = call.shared_by * call.qk_first[call.heads];
  AttentionCall attention;
  attention.batch = call.batch;
  attention.queries = call.tokens;
  attention.keys = call.past + call.tokens;
  attention.heads = call.heads;
  attention.shared_by = call.shared_by;
  attention.causal = true;
  attention.qk_first = call.qk_first;
  attention.v_first = call.v_first;
  attention.q = q;
  attention.q_batch_stride = call.tokens * channels;
  attention.q_stride = channels;
  attention.k = call.keys;
  attention.k_batch_stride = call.k_batch_stride;
  attention.k_stride = call.k_stride;
  attention.v = call.values;
  attention.v_batch_stride = call.v_batch_stride;
  attention.v_stride = call.v_stride;
  attention.y = y;
  attention.y_batch_stride = call.tokens * call.o.k;
  attention.y_stride = call.o.k;
  attention.scale = call.scale;
  attention.threads = call.threads;
  compact_attention(isa, attention);
}

}  // namespace

void attention_block(Isa isa, const AttentionBlockCall& call) {
  check(call);
  const std::int64_t rows = call.batch * call.tokens;
  const std::int64_t keys = call.qk_first[call.heads], queries = call.shared_by * keys;
  const std::int64_t values = call.v_first[call.heads];
  if (rows == 0) return;
  static thread_local Scratch scratch;
  const std::int64_t sizes[] = {call.hidden, call.qkv.n, queries, call.o.k};
  std::int64_t total = 0;
  for (std::int64_t size : sizes) total += round_up(rows * size, kLine / 4);
  float* parts[4];
  parts[0] = scratch.get<float>(total);
  for (int i = 0; i < 3; ++i) parts[i + 1] = parts[i] + round_up(rows * sizes[i], kLine / 4);
  const auto [normed, projected, q, context] = parts;

  rms_norm({rows, call.hidden, call.x, call.x_stride, call.norm, call.eps, normed, call.threads});
  compact_linear(isa, block::product(rows, call.qkv, normed, projected, call.threads));
  turn(call, call.shared_by, projected, q, call.tokens * queries, queries);
  turn(call, 1, projected + queries, call.keys + call.past * call.k_stride, call.k_batch_stride,
       call.k_stride);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t sequence = row / call.tokens, token = call.past + row % call.tokens;
    std::memcpy(call.values + sequence * call.v_batch_stride + token * call.v_stride,
                projected + row * call.qkv.n + queries + keys, static_cast<std::size_t>(values) * 4);
  }
  attend(isa, call, q, context);
  compact_linear(isa, block::into_residual(call, rows, context, call.y));
}

}  // namespace prunekern
