// What the calls of whole blocks are made of: the arguments of their parts, filled in the same way.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "prunekern/attention.h"
#include "prunekern/mlp.h"

namespace prunekern::block {

// weight x, x [rows, weight.k], contiguous, to y [rows, weight.n].
inline LinearCall product(std::int64_t rows, const Packed& weight, const float* x, float* y, int threads) {
  LinearCall linear;
  linear.m = rows;
  linear.in_features = linear.x_stride = weight.k;
  linear.weight = weight;
  linear.x = x;
  linear.y = y;
  linear.n_out = linear.y_stride = weight.n;
  linear.threads = threads;
  return linear;
}

// call.x + call.o context, to y [rows, hidden]: channels that o does not make are those of x.
template <class Call>
LinearCall into_residual(const Call& call, std::int64_t rows, const float* context, float* y) {
  LinearCall o = product(rows, call.o, context, y, call.threads);
  o.out_index = call.out_index;
  o.n_out = o.y_stride = call.hidden;
  o.residual = call.x;
  o.residual_stride = call.x_stride;
  return o;
}

// Of encoders, from here on: q, k and v [rows, qkv.n] stand side by side.

// What the parts do not see: that they fit one another.
template <class Call>
void check(const char* name, const Call& call) {
  auto fail = [&](const std::string& message) { throw std::invalid_argument(name + (": " + message)); };
  if (call.batch < 0 || call.tokens < 0 || call.heads < 1)
    fail("sizes must not be negative, and heads not zero");
  const std::int64_t keys = call.qk_first[call.heads], values = call.v_first[call.heads];
  auto fits = [&](const char* part, const Packed& weight, std::int64_t n, std::int64_t k) {
    if (weight.n != n || weight.k != k)
      fail(std::string(part) + " must make " + std::to_string(n) + " channels of " + std::to_string(k) +
           " (got " + std::to_string(weight.n) + " of " + std::to_string(weight.k) + ")");
  };
  fits("qkv", call.qkv, 2 * keys + values, call.hidden);
  fits("o", call.o, call.o.n, values);
}

// From projected [rows, qkv.n] to context [rows, o.k]. Bias, window and the like are the caller's.
template <class Call>
AttentionCall attention(const Call& call, const float* projected, float* context) {
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
  attention.scale = call.scale;
  attention.arithmetic = call.arithmetic;
  attention.threads = call.threads;
  return attention;
}

// residual + mlp(x), both [rows, hidden], to call.y.
template <class Call>
MlpCall mlp(const Call& call, std::int64_t rows, const float* x, const float* residual) {
  MlpCall mlp;
  mlp.m = rows;
  mlp.in_features = mlp.n_out = mlp.x_stride = mlp.y_stride = mlp.residual_stride = call.hidden;
  mlp.x = x;
  mlp.residual = residual;
  mlp.y = call.y;
  mlp.up = call.up;
  mlp.down = call.down;
  mlp.out_index = call.mlp_out_index;
  mlp.activation = call.activation;
  mlp.threads = call.threads;
  return mlp;
}

}  // namespace prunekern::block
