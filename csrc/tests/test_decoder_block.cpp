// decoder_block against its parts, called one after the other: the same numbers, bit for bit.
#include <algorithm>

#include "tests/block_parts.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;
constexpr std::int64_t kHidden = 37, kShared = 3, kAngles = 9, kInner = 45;
const std::vector<std::int64_t> kKeyFirst{0, 6, 10, 18}, kValueFirst{0, 5, 5, 17};

// A call, and all it points to.
struct Subject {
  std::int64_t batch, tokens, past, keys = kKeyFirst.back(), values = kValueFirst.back();
  Weights qkv, o, up, gate, down;
  std::vector<std::int64_t> out_index, angle;
  std::vector<float> x, norm, ffn_norm, cos, sin, k, v, y;
  DecoderBlockCall call;

  Subject(Isa isa, WeightType type, std::int64_t b, std::int64_t t, std::int64_t p, int threads)
      : batch(b),
        tokens(t),
        past(p),
        qkv(isa, type, (kShared + 1) * keys + values, kHidden, 1),
        o(isa, type, kHidden - 4, kShared * values, 3),
        up(isa, type, kInner, kHidden, 5),
        gate(isa, type, kInner, kHidden, 7),
        down(isa, type, kHidden - 4, kInner, 9),
        x(random_floats(b * t * kHidden, 11)),
        norm(random_floats(kHidden, 12)),
        ffn_norm(random_floats(kHidden, 13)),
        cos(random_floats(t * kAngles, 14)),
        sin(random_floats(t * kAngles, 15)),
        k(random_floats(b * (p + t + 2) * keys, 16)),
        v(random_floats(b * (p + t + 2) * values, 17)),
        y(b * t * kHidden + 9, kPoison) {
    for (std::int64_t i = 2; i < kHidden - 2; ++i) out_index.push_back(i);
    for (std::int64_t i = 0; i < keys / 2; ++i) angle.push_back(i * 5 % kAngles);
    AttentionBlockCall& a = call.attention;
    a.batch = batch;
    a.tokens = tokens;
    a.past = past;
    a.hidden = a.x_stride = kHidden;
    a.x = x.data();
    a.norm = norm.data();
    a.eps = call.eps = 1e-5f;
    a.qkv = qkv.packed;
    a.o = o.packed;
    a.out_index = call.out_index = out_index.data();
    a.heads = static_cast<std::int64_t>(kKeyFirst.size()) - 1;
    a.shared_by = kShared;
    a.qk_first = kKeyFirst.data();
    a.v_first = kValueFirst.data();
    a.cos = cos.data();
    a.sin = sin.data();
    a.cos_stride = a.sin_stride = a.angles = kAngles;
    a.angle = angle.data();
    a.keys = k.data();
    a.values = v.data();
    a.k_stride = keys;
    a.v_stride = values;
    a.k_batch_stride = (past + tokens + 2) * keys;
    a.v_batch_stride = (past + tokens + 2) * values;
    a.scale = 0.4f;
    a.y = y.data();
    a.threads = threads;
    call.norm = ffn_norm.data();
    call.up = up.packed;
    call.gate = gate.packed;
    call.down = down.packed;
  }
};

// The parts, from x to y; keys and values go into s.k and s.v.
std::vector<float> by_parts(Isa isa, Subject& s) {
  const std::int64_t rows = s.batch * s.tokens, made = s.qkv.packed.n, queries = kShared * s.keys;
  std::vector<float> normed(rows * kHidden);
  rms_norm({rows, kHidden, s.x.data(), kHidden, s.norm.data(), 1e-5f, normed.data(), 1});
  const std::vector<float> p = linear(isa, s.qkv.packed, normed, rows, made);
  std::vector<float> q(rows * queries), k(rows * s.keys), context(rows * s.o.packed.k);
  RotaryCall r;
  r.batch = s.batch;
  r.tokens = s.tokens;
  r.heads = s.call.attention.heads;
  r.first = kKeyFirst.data();
  r.angle = s.angle.data();
  r.angles = r.cos_stride = r.sin_stride = kAngles;
  r.cos = s.cos.data();
  r.sin = s.sin.data();
  r.x_batch_stride = s.tokens * made;
  r.x_stride = made;
  for (bool is_query : {true, false}) {
    r.shared_by = is_query ? kShared : 1;
    r.x = p.data() + (is_query ? 0 : queries);
    r.y = is_query ? q.data() : k.data();
    r.y_stride = is_query ? queries : s.keys;
    r.y_batch_stride = s.tokens * r.y_stride;
    rotate_pairs(r);
  }
  const std::int64_t held = s.past + s.tokens + 2;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t at = row / s.tokens * held + s.past + row % s.tokens;
    std::copy_n(&k[row * s.keys], s.keys, &s.k[at * s.keys]);
    std::copy_n(&p[row * made + queries + s.keys], s.values, &s.v[at * s.values]);
  }
  AttentionCall a;
  a.batch = s.batch;
  a.queries = s.tokens;
  a.keys = s.past + s.tokens;
  a.heads = r.heads;
  a.shared_by = kShared;
  a.causal = true;
  a.qk_first = kKeyFirst.data();
  a.v_first = kValueFirst.data();
  a.q = q.data();
  a.k = s.k.data();
  a.v = s.v.data();
  a.y = context.data();
  a.q_stride = queries;
  a.k_stride = s.keys;
  a.v_stride = s.values;
  a.y_stride = s.o.packed.k;
  a.q_batch_stride = s.tokens * queries;
  a.k_batch_stride = held * s.keys;
  a.v_batch_stride = held * s.values;
  a.y_batch_stride = s.tokens * s.o.packed.k;
  a.scale = 0.4f;
  compact_attention(isa, a);
  std::vector<float> y = linear(isa, s.o.packed, context, rows, kHidden, &s.out_index, &s.x);
  rms_norm({rows, kHidden, y.data(), kHidden, s.ffn_norm.data(), 1e-5f, normed.data(), 1});
  MlpCall m;
  m.m = rows;
  m.in_features = m.x_stride = m.n_out = m.y_stride = m.residual_stride = kHidden;
  m.up = s.up.packed;
  m.gate = s.gate.packed;
  m.down = s.down.packed;
  m.x = normed.data();
  m.out_index = s.out_index.data();
  m.activation = Activation::silu;
  std::vector<float> out(rows * kHidden);
  m.residual = y.data();
  m.y = out.data();
  compact_mlp(isa, m);
  return out;
}

void run(Isa isa, WeightType type, std::int64_t batch, std::int64_t tokens, std::int64_t past, int threads) {
  Subject one(isa, type, batch, tokens, past, threads), two(isa, type, batch, tokens, past, threads);
  decoder_block(isa, one.call);
  const std::vector<float> want = by_parts(isa, two);
  const char* what = name(isa);
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(one.y[i] == want[i], "%s batch %ld tokens %ld past %ld: y %ld is %g, want %g", what, long(batch),
          long(tokens), long(past), long(i), one.y[i], want[i]);
  CHECK(one.k == two.k && one.v == two.v, "%s: the cache differs", what);
  for (std::size_t i = want.size(); i < one.y.size(); ++i) CHECK(one.y[i] == kPoison, "wrote past the end");
}

}  // namespace

int main() {
  for (Isa isa : supported_isas())
    for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8})
      for (std::int64_t past : {0, 1, 40})
        for (std::int64_t tokens : {1, 3})
          for (std::int64_t batch : {1, 2}) run(isa, type, batch, tokens, past, int(1 + past % 2));

  // A refused call leaves the cache alone.
  Subject s(Isa::generic, WeightType::fp32, 1, 1, 4, 1);
  const std::vector<float> k = s.k, v = s.v;
  auto refusal = [&] { return message_of([&] { decoder_block(Isa::generic, s.call); }); };
  s.call.down.k = 7;
  CHECK(refusal() == "compact_mlp: down must read what up makes (up is 45 x 37, down 33 x 7)", "down");
  s.call.down.k = kInner;
  s.call.attention.o.k = 50;
  CHECK(refusal() == "attention_block: o must read 51 channels (got 50)", "o");
  s.call.attention.o.k = 51;
  s.call.attention.qkv.n -= 1;
  CHECK(refusal() == "attention_block: qkv must make 89 channels (got 88)", "qkv");
  CHECK(s.k == k && s.v == v && s.y[0] == kPoison, "a refused call has written");
  return 0;
}
