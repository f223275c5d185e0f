// encoder_block against its parts, called one after the other with as many threads: the same numbers, bit for
// bit.
#include <cmath>
#include <memory>

#include "tests/block_parts.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;
constexpr std::int64_t kHidden = 37, kInner = 45;
const std::vector<std::int64_t> kKeyFirst{0, 7, 11, 18}, kValueFirst{0, 5, 5, 17};

// A call, and all it points to.
struct Subject {
  std::int64_t batch, tokens, keys = kKeyFirst.back(), values = kValueFirst.back();
  Weights qkv, o, up, down;
  std::vector<std::int64_t> out_index;
  std::vector<float> x, weight, bias, mlp_weight, mlp_bias, y;
  std::unique_ptr<bool[]> mask;
  std::vector<float> logits;
  std::vector<std::int64_t> bias_head{2, 0, 3};
  EncoderBlockCall call;

  Subject(Isa isa, WeightType type, std::int64_t b, std::int64_t t, bool masked, int threads)
      : batch(b),
        tokens(t),
        qkv(isa, type, 2 * keys + values, kHidden, 1),
        o(isa, type, kHidden - 4, values, 3),
        up(isa, type, kInner, kHidden, 5),
        down(isa, type, kHidden - 4, kInner, 9),
        x(random_floats(b * t * kHidden, 11)),
        weight(random_floats(kHidden, 12)),
        bias(random_floats(kHidden, 13)),
        mlp_weight(random_floats(kHidden, 14)),
        mlp_bias(random_floats(kHidden, 15)),
        y(b * t * kHidden + 9, kPoison),
        mask(new bool[b * t]),
        logits(random_floats(4 * t * t, 16)) {
    for (std::int64_t i = 2; i < kHidden - 2; ++i) out_index.push_back(i);
    for (std::int64_t i = 0; i < b * t; ++i) mask[i] = i % 3 != 1;
    call.batch = batch;
    call.tokens = tokens;
    call.hidden = call.x_stride = kHidden;
    call.x = x.data();
    call.qkv = qkv.packed;
    call.o = o.packed;
    call.out_index = call.mlp_out_index = out_index.data();
    call.heads = static_cast<std::int64_t>(kKeyFirst.size()) - 1;
    call.qk_first = kKeyFirst.data();
    call.v_first = kValueFirst.data();
    call.key_mask = masked ? mask.get() : nullptr;
    call.key_mask_stride = tokens;
    if (t == 17) {  // a bias of the logits, as well
      call.bias = logits.data();
      call.bias_head = bias_head.data();
    }
    call.scale = 0.4f;
    call.arithmetic = type == WeightType::fp32 ? Arithmetic::fp32 : Arithmetic::bf16;
    call.norm = {weight.data(), bias.data(), 1e-5f};
    call.mlp_norm = {mlp_weight.data(), mlp_bias.data(), 1e-4f};
    call.up = up.packed;
    call.down = down.packed;
    call.activation = Activation::gelu;
    call.y = y.data();
    call.threads = threads;
  }
};

void norm(Isa isa, std::vector<float>& x, const std::vector<float>& weight, const std::vector<float>& bias,
          float eps) {
  const auto rows = static_cast<std::int64_t>(x.size()) / kHidden;
  layer_norm(isa, {rows, kHidden, x.data(), kHidden, weight.data(), bias.data(), eps, x.data(), 1});
}

std::vector<float> by_parts(Isa isa, const Subject& s) {
  const std::int64_t rows = s.batch * s.tokens, made = s.qkv.packed.n;
  const std::vector<float> p = linear(isa, s.qkv.packed, s.x, rows, made, nullptr, nullptr, s.call.threads);
  std::vector<float> context(rows * s.values);
  AttentionCall a;
  a.batch = s.batch;
  a.queries = a.keys = s.tokens;
  a.heads = s.call.heads;
  a.qk_first = kKeyFirst.data();
  a.v_first = kValueFirst.data();
  a.q = p.data();
  a.k = p.data() + s.keys;
  a.v = p.data() + 2 * s.keys;
  a.y = context.data();
  a.q_stride = a.k_stride = a.v_stride = made;
  a.q_batch_stride = a.k_batch_stride = a.v_batch_stride = s.tokens * made;
  a.y_stride = s.values;
  a.y_batch_stride = s.tokens * s.values;
  a.key_mask = s.call.key_mask;
  a.key_mask_stride = s.tokens;
  a.bias = s.call.bias;
  a.bias_head = s.call.bias_head;
  a.scale = 0.4f;
  a.arithmetic = s.call.arithmetic;
  a.threads = s.call.threads;
  compact_attention(isa, a);
  std::vector<float> attended =
      linear(isa, s.o.packed, context, rows, kHidden, &s.out_index, &s.x, s.call.threads);
  norm(isa, attended, s.weight, s.bias, 1e-5f);
  MlpCall m;
  m.m = rows;
  m.in_features = m.x_stride = m.n_out = m.y_stride = m.residual_stride = kHidden;
  m.up = s.up.packed;
  m.down = s.down.packed;
  m.x = m.residual = attended.data();
  m.out_index = s.out_index.data();
  m.activation = Activation::gelu;
  m.threads = s.call.threads;
  std::vector<float> y(rows * kHidden);
  m.y = y.data();
  compact_mlp(isa, m);
  norm(isa, y, s.mlp_weight, s.mlp_bias, 1e-4f);
  return y;
}

void run(Isa isa, WeightType type, std::int64_t batch, std::int64_t tokens, bool masked, int threads) {
  Subject one(isa, type, batch, tokens, masked, threads);
  encoder_block(isa, one.call);
  const std::vector<float> want = by_parts(isa, one);
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(one.y[i] == want[i], "%s batch %ld tokens %ld: y %ld is %g, want %g", name(isa), long(batch),
          long(tokens), long(i), one.y[i], want[i]);
  for (std::size_t i = want.size(); i < one.y.size(); ++i) CHECK(one.y[i] == kPoison, "wrote past the end");
}

// Sequences of any length, one after the other, are what each is by itself: to rounding, as products of more
// rows take other tiles.
void run_together(Isa isa) {
  const std::int64_t starts[] = {0, 3, 3, 20, 21, 26};
  Subject all(isa, WeightType::fp32, 1, 26, false, 2);
  all.call.batch = 5;
  all.call.tokens = 0;  // not read
  all.call.starts = starts;
  encoder_block(isa, all.call);
  for (int s = 0; s < 5; ++s) {
    const std::int64_t first = starts[s], count = starts[s + 1] - first;
    if (count == 0) continue;
    Subject one(isa, WeightType::fp32, 1, count, false, 1);
    one.call.bias = nullptr;
    one.call.bias_head = nullptr;
    one.call.x = all.x.data() + first * kHidden;
    encoder_block(isa, one.call);
    for (std::int64_t i = 0; i < count * kHidden; ++i)
      CHECK(std::abs(one.y[i] - all.y[first * kHidden + i]) < 2e-5f, "%s sequence %d: y %ld is %g, want %g",
            name(isa), s, long(i), all.y[first * kHidden + i], one.y[i]);
  }
  for (std::size_t i = 26 * kHidden; i < all.y.size(); ++i) CHECK(all.y[i] == kPoison, "wrote past the end");
}

}  // namespace

int main() {
  for (Isa isa : supported_isas()) run_together(isa);
  for (Isa isa : supported_isas())
    for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8, WeightType::int4})
      for (bool masked : {false, true})
        for (std::int64_t tokens : {1, 3, 17})
          for (std::int64_t batch : {1, 2}) run(isa, type, batch, tokens, masked, int(1 + tokens % 2));

  Subject s(Isa::generic, WeightType::fp32, 1, 4, false, 1);
  auto refusal = [&] { return message_of([&] { encoder_block(Isa::generic, s.call); }); };
  s.call.o.k = 9;
  CHECK(refusal() == "encoder_block: o must make 33 channels of 17 (got 33 of 9)", "o");
  s.call.o.k = 17;
  s.call.qkv.n -= 1;
  CHECK(refusal() == "encoder_block: qkv must make 53 channels of 37 (got 52 of 37)", "qkv");
  s.call.qkv.n += 1;
  s.call.down.k = 7;
  CHECK(refusal() == "compact_mlp: down must read what up makes (up is 45 x 37, down 33 x 7)", "down");
  s.call.down.k = kInner;
  const std::int64_t falling[] = {0, 3, 2};
  s.call.starts = falling;
  s.call.batch = 2;
  CHECK(refusal() == "encoder_block: starts must ascend from 0 (got 2 after 3)", "starts");
  s.call.key_mask = s.mask.get();
  CHECK(refusal() == "encoder_block: starts leave no keys to forbid, and no bias", "starts and a mask");
  s.call.key_mask = nullptr;
  s.call.starts = nullptr;
  s.call.batch = 0;
  encoder_block(Isa::generic, s.call);
  CHECK(s.y[0] == kPoison, "a refused or empty call has written");
  return 0;
}
