// prenorm_block against its parts, called one after the other with as many threads: the same numbers, bit for
// bit.
#include <cmath>
#include <memory>

#include "prunekern/prenorm_block.h"
#include "prunekern/rotary.h"
#include "tests/block_parts.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;
constexpr std::int64_t kHidden = 37, kInner = 45, kAngles = 5;
const std::vector<std::int64_t> kKeyFirst{0, 8, 10, 18}, kValueFirst{0, 5, 5, 17};
const std::vector<std::int64_t> kAngle{0, 1, 2, 4, 3, 1, 2, 3, 4};

struct Case {
  WeightType type;
  std::int64_t batch, tokens, window;
  bool masked, first, biased;  // first: no norm before attention; biased: norms have a bias
  int threads;
};

// A call, and all it points to.
struct Subject {
  const Case& c;
  std::int64_t keys = kKeyFirst.back(), values = kValueFirst.back();
  Weights qkv, o, up, gate, down;
  std::vector<std::int64_t> out_index;
  std::vector<float> x, norm, bias, mlp_norm, cos, sin, y;
  std::unique_ptr<bool[]> mask;
  PrenormBlockCall call;

  Subject(Isa isa, const Case& of)
      : c(of),
        qkv(isa, c.type, 2 * keys + values, kHidden, 1),
        o(isa, c.type, kHidden - 4, values, 3),
        up(isa, c.type, kInner, kHidden, 5),
        gate(isa, c.type, kInner, kHidden, 7),
        down(isa, c.type, kHidden - 4, kInner, 9),
        x(random_floats(c.batch * c.tokens * kHidden, 11)),
        norm(random_floats(kHidden, 12)),
        bias(random_floats(kHidden, 13)),
        mlp_norm(random_floats(kHidden, 14)),
        y(c.batch * c.tokens * kHidden + 9, kPoison),
        mask(new bool[c.batch * c.tokens]) {
    for (std::int64_t i = 2; i < kHidden - 2; ++i) out_index.push_back(i);
    for (std::int64_t i = 0; i < c.batch * c.tokens; ++i) mask[i] = i % 3 != 1;
    for (std::int64_t t = 0; t < c.tokens; ++t)
      for (std::int64_t a = 0; a < kAngles; ++a) {
        cos.push_back(std::cos(0.3f * t / (1 + a)));
        sin.push_back(std::sin(0.3f * t / (1 + a)));
      }
    call.batch = c.batch;
    call.tokens = c.tokens;
    call.hidden = call.x_stride = kHidden;
    call.x = x.data();
    if (!c.first) call.norm = {norm.data(), c.biased ? bias.data() : nullptr, 1e-5f};
    call.qkv = qkv.packed;
    call.angle = kAngle.data();
    call.angles = call.cos_stride = call.sin_stride = kAngles;
    call.cos = cos.data();
    call.sin = sin.data();
    call.o = o.packed;
    call.out_index = call.mlp_out_index = out_index.data();
    call.heads = static_cast<std::int64_t>(kKeyFirst.size()) - 1;
    call.qk_first = kKeyFirst.data();
    call.v_first = kValueFirst.data();
    call.key_mask = c.masked ? mask.get() : nullptr;
    call.key_mask_stride = c.tokens;
    call.window = c.window;
    call.scale = 0.4f;
    call.arithmetic = c.type == WeightType::fp32 ? Arithmetic::fp32 : Arithmetic::bf16;
    call.mlp_norm = {mlp_norm.data(), c.biased ? bias.data() : nullptr, 1e-4f};
    call.up = up.packed;
    call.gate = gate.packed;
    call.down = down.packed;
    call.activation = Activation::gelu;
    call.y = y.data();
    call.threads = c.threads;
  }
};

std::vector<float> normed(Isa isa, const std::vector<float>& x, const NormOf& norm) {
  std::vector<float> y(x.size());
  const auto rows = static_cast<std::int64_t>(x.size()) / kHidden;
  layer_norm(isa, {rows, kHidden, x.data(), kHidden, norm.weight, norm.bias, norm.eps, y.data(), 1});
  return y;
}

// Queries, or keys, from `projected` on: contiguous.
std::vector<float> turned(const Subject& s, const float* projected) {
  std::vector<float> y(s.c.batch * s.c.tokens * s.keys);
  RotaryCall rotary;
  rotary.batch = s.c.batch;
  rotary.tokens = s.c.tokens;
  rotary.heads = s.call.heads;
  rotary.first = kKeyFirst.data();
  rotary.angle = kAngle.data();
  rotary.angles = rotary.cos_stride = rotary.sin_stride = kAngles;
  rotary.cos = s.cos.data();
  rotary.sin = s.sin.data();
  rotary.x = projected;
  rotary.x_stride = s.qkv.packed.n;
  rotary.x_batch_stride = s.c.tokens * s.qkv.packed.n;
  rotary.y = y.data();
  rotary.y_stride = s.keys;
  rotary.y_batch_stride = s.c.tokens * s.keys;
  rotate_pairs(rotary);
  return y;
}

std::vector<float> by_parts(Isa isa, const Subject& s) {
  const std::int64_t rows = s.c.batch * s.c.tokens, made = s.qkv.packed.n;
  const std::vector<float> p = linear(isa, s.qkv.packed, s.c.first ? s.x : normed(isa, s.x, s.call.norm),
                                      rows, made, nullptr, nullptr, s.c.threads);
  const std::vector<float> q = turned(s, p.data()), k = turned(s, p.data() + s.keys);
  std::vector<float> context(rows * s.values);
  AttentionCall a;
  a.batch = s.c.batch;
  a.queries = a.keys = s.c.tokens;
  a.heads = s.call.heads;
  a.qk_first = kKeyFirst.data();
  a.v_first = kValueFirst.data();
  a.q = q.data();
  a.k = k.data();
  a.v = p.data() + 2 * s.keys;
  a.y = context.data();
  a.q_stride = a.k_stride = s.keys;
  a.q_batch_stride = a.k_batch_stride = s.c.tokens * s.keys;
  a.v_stride = made;
  a.v_batch_stride = s.c.tokens * made;
  a.y_stride = s.values;
  a.y_batch_stride = s.c.tokens * s.values;
  a.key_mask = s.call.key_mask;
  a.key_mask_stride = s.c.tokens;
  a.window = s.c.window;
  a.scale = 0.4f;
  a.arithmetic = s.call.arithmetic;
  a.threads = s.c.threads;
  compact_attention(isa, a);
  const std::vector<float> attended =
      linear(isa, s.o.packed, context, rows, kHidden, &s.out_index, &s.x, s.c.threads);
  const std::vector<float> n = normed(isa, attended, s.call.mlp_norm);
  MlpCall m;
  m.m = rows;
  m.in_features = m.x_stride = m.n_out = m.y_stride = m.residual_stride = kHidden;
  m.up = s.up.packed;
  m.gate = s.gate.packed;
  m.down = s.down.packed;
  m.x = n.data();
  m.residual = attended.data();
  m.out_index = s.out_index.data();
  m.activation = Activation::gelu;
  m.threads = s.c.threads;
  std::vector<float> y(rows * kHidden);
  m.y = y.data();
  compact_mlp(isa, m);
  return y;
}

void run(Isa isa, const Case& c) {
  Subject one(isa, c);
  prenorm_block(isa, one.call);
  const std::vector<float> want = by_parts(isa, one);
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(one.y[i] == want[i], "%s batch %ld tokens %ld window %ld: y %ld is %g, want %g", name(isa),
          long(c.batch), long(c.tokens), long(c.window), long(i), one.y[i], want[i]);
  for (std::size_t i = want.size(); i < one.y.size(); ++i) CHECK(one.y[i] == kPoison, "wrote past the end");
}

}  // namespace

int main() {
  for (Isa isa : supported_isas())
    for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8, WeightType::int4})
      for (bool masked : {false, true})
        for (std::int64_t tokens : {1, 3, 17})
          for (std::int64_t window : {-1, 2})
            run(isa,
                {type, 1 + tokens % 2, tokens, window, masked, tokens == 3, masked, int(1 + tokens % 2)});

  const Case small{WeightType::fp32, 1, 4, -1, false, false, true, 1};
  Subject s(Isa::generic, small);
  auto refusal = [&] { return message_of([&] { prenorm_block(Isa::generic, s.call); }); };
  s.call.o.k = 9;
  CHECK(refusal() == "prenorm_block: o must make 33 channels of 17 (got 33 of 9)", "o");
  s.call.o.k = 17;
  s.call.qkv.n -= 1;
  CHECK(refusal() == "prenorm_block: qkv must make 53 channels of 37 (got 52 of 37)", "qkv");
  s.call.qkv.n += 1;
  s.call.batch = 0;
  prenorm_block(Isa::generic, s.call);
  CHECK(s.y[0] == kPoison, "a refused or empty call has written");
  return 0;
}
