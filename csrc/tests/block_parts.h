// What the tests of whole blocks are made of: a packed weight with all it points to, and a linear layer.
#pragma once

#include "tests/check.h"

struct Weights {
  std::vector<float> plain, bias, scale;
  std::vector<std::uint8_t> panels;
  prunekern::Packed packed;

  Weights(prunekern::Isa isa, prunekern::WeightType type, std::int64_t n, std::int64_t k, std::uint32_t seed)
      : plain(random_floats(n * k, seed)), bias(random_floats(n, seed + 1)), scale(n) {
    panels.resize(packed_bytes(isa, type, n, k) + 64);
    void* to = panels.data() + (64 - reinterpret_cast<std::uintptr_t>(panels.data()) % 64) % 64;
    pack_weight(isa, type, plain.data(), k, 1, n, k, to, scale.data());
    packed.n = n;
    packed.k = k;
    packed.type = type;
    packed.data = to;
    packed.bias = bias.data();
    packed.scale = type == prunekern::WeightType::int8 ? scale.data() : nullptr;
  }
};

// y [m, n_out] of x [m, weight.k]; out_index, residual: null for none.
inline std::vector<float> linear(prunekern::Isa isa, const prunekern::Packed& weight,
                                 const std::vector<float>& x, std::int64_t m, std::int64_t n_out,
                                 const std::vector<std::int64_t>* out_index = nullptr,
                                 const std::vector<float>* residual = nullptr, int threads = 1) {
  std::vector<float> y(m * n_out);
  prunekern::LinearCall call;
  call.m = m;
  call.in_features = call.x_stride = weight.k;
  call.x = x.data();
  call.weight = weight;
  call.y = y.data();
  call.n_out = call.y_stride = call.residual_stride = n_out;
  call.threads = threads;
  if (out_index != nullptr) call.out_index = out_index->data();
  if (residual != nullptr) call.residual = residual->data();
  compact_linear(isa, call);
  return y;
}
