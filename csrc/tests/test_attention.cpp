// compact_attention against float64, every instruction set: ragged heads, odd sizes, masks, strides, threads.
#include <algorithm>
#include <memory>

#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;
const float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Mask { none, padding, holes, nothing_allowed };

struct Case {
  std::int64_t batch, queries, keys;
  std::vector<std::int64_t> qk, v;  // channels of each head
  Mask mask = Mask::none;
  int threads = 1;
  float size = 1.0f;  // of q: large ones make large logits
  float scale = 0.3f;
  std::int64_t shared_by = 1;
  bool causal = false;
  Arithmetic arithmetic = Arithmetic::fp32;
  bool biased = false;
  std::int64_t window = -1;
};

// Products of bf16, and fp32 arithmetic that no other set has tested.
bool has_pairs(Isa isa) { return isa >= Isa::avx512_bf16 && bf16_verdict().pays; }
bool is_a_copy(Isa isa) { return isa == Isa::avx2_vnni || isa > Isa::avx512; }

std::vector<std::int64_t> firsts(const std::vector<std::int64_t>& widths) {
  std::vector<std::int64_t> first{0};
  for (std::int64_t width : widths) first.push_back(first.back() + width);
  return first;
}

// A [batch, tokens, channels] array inside a larger one: rows and sequences with something between them.
struct Strided {
  std::int64_t stride, batch_stride;
  std::vector<float> data;
  Strided(std::int64_t batch, std::int64_t tokens, std::int64_t channels, unsigned seed)
      : stride(channels + 7),
        batch_stride(tokens * stride + 11),
        data(random_floats(batch * batch_stride + 1, seed)) {}
  float& at(std::int64_t b, std::int64_t t, std::int64_t c) {
    return data[b * batch_stride + t * stride + c];
  }
};

bool is_allowed(Mask mask, std::int64_t b, std::int64_t key, std::int64_t keys) {
  if (mask == Mask::padding) return key < std::max<std::int64_t>(1, keys - 1 - b * keys / 3);
  if (mask == Mask::holes) return (key * 7 + b) % 3 != 0;
  return mask == Mask::none || (mask == Mask::nothing_allowed && b % 2 == 1);
}

bool is_seen(const Case& c, std::int64_t b, std::int64_t query, std::int64_t key) {
  if (c.window >= 0 && std::abs(key - query) > c.window) return false;
  return is_allowed(c.mask, b, key, c.keys) && (!c.causal || key <= c.keys - c.queries + query);
}

void run_with(Isa isa, const Case& c) {
  const std::vector<std::int64_t> qk = firsts(c.qk), v = firsts(c.v);
  const std::int64_t heads = static_cast<std::int64_t>(c.qk.size());
  const std::int64_t shared = c.shared_by;
  Strided q(c.batch, c.queries, shared * qk.back(), 1), k(c.batch, c.keys, qk.back(), 2),
      value(c.batch, c.keys, v.back(), 3), y(c.batch, c.queries, shared * v.back(), 4);
  for (float& x : q.data) x *= c.size;
  std::fill(y.data.begin(), y.data.end(), kPoison);
  const std::int64_t mask_stride = c.keys + 5;
  std::unique_ptr<bool[]> mask(new bool[c.batch * mask_stride]());
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t t = 0; t < c.keys; ++t) {
      mask[b * mask_stride + t] = is_allowed(c.mask, b, t, c.keys);
      if (mask[b * mask_stride + t]) continue;  // what nobody may read
      for (std::int64_t i = 0; i < qk.back(); ++i) k.at(b, t, i) = kNaN;
      for (std::int64_t i = 0; i < v.back(); ++i) value.at(b, t, i) = kNaN;
    }

  AttentionCall call;
  call.batch = c.batch;
  call.queries = c.queries;
  call.keys = c.keys;
  call.heads = heads;
  call.qk_first = qk.data();
  call.v_first = v.data();
  call.q = q.data.data();
  call.k = k.data.data();
  call.v = value.data.data();
  call.y = y.data.data();
  call.q_stride = q.stride;
  call.k_stride = k.stride;
  call.v_stride = value.stride;
  call.y_stride = y.stride;
  call.q_batch_stride = q.batch_stride;
  call.k_batch_stride = k.batch_stride;
  call.v_batch_stride = value.batch_stride;
  call.y_batch_stride = y.batch_stride;
  call.key_mask = c.mask == Mask::none ? nullptr : mask.get();
  call.key_mask_stride = mask_stride;
  call.scale = c.scale;
  call.threads = c.threads;
  call.shared_by = shared;
  call.causal = c.causal;
  call.window = c.window;
  call.arithmetic = c.arithmetic;
  // One matrix more than heads; what stands at forbidden keys is not read.
  std::vector<float> bias = random_floats((heads + 1) * c.queries * c.keys, 5);
  std::vector<std::int64_t> bias_head;
  for (std::int64_t h = 0; h < heads; ++h) bias_head.push_back(heads - h);
  auto bias_at = [&](std::int64_t h, std::int64_t t, std::int64_t s) {
    return c.biased ? 3.0 * bias[((heads - h) * c.queries + t) * c.keys + s] : 0.0;
  };
  std::vector<float> tripled = bias;
  for (float& x : tripled) x *= 3.0f;
  if (c.biased) {
    call.bias = tripled.data();
    call.bias_head = bias_head.data();
  }
  compact_attention(isa, call);

  // What bf16 rounds: q, scale k, powers, v, by half a step of 2^-8 each.
  const double narrow = c.arithmetic == Arithmetic::bf16 && has_pairs(isa) ? 0x1.02p-8 : 0.0;
  const double eps = 0x1p-24;
  std::vector<double> logit(c.keys);
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t each = 0; each < heads * shared; ++each)
      for (std::int64_t t = 0; t < c.queries; ++t) {
        const std::int64_t h = each / shared, d = c.qk[h];
        const std::int64_t q_at = shared * qk[h] + each % shared * d;  // of this query head
        const std::int64_t y_at = shared * v[h] + each % shared * c.v[h];
        double largest = -std::numeric_limits<double>::infinity(), error = 0.0, sum = 0.0;
        std::int64_t allowed = 0;
        for (std::int64_t s = 0; s < c.keys; ++s) {
          if (!is_seen(c, b, t, s)) continue;
          double size = 0.0;
          logit[s] = 0.0;
          for (std::int64_t i = qk[h]; i < qk[h + 1]; ++i) {
            const double product = double(c.scale) * q.at(b, t, q_at + i - qk[h]) * k.at(b, s, i);
            logit[s] += product;
            size += std::fabs(product);
          }
          logit[s] += bias_at(h, t, s);
          size += std::fabs(bias_at(h, t, s)) + (c.biased ? std::fabs(logit[s]) : 0.0);
          largest = std::max(largest, logit[s]);
          error = std::max(error, (double(d + 4) * eps + narrow) * size);  // of any logit of this row
          ++allowed;
        }
        for (std::int64_t s = 0; s < c.keys; ++s)
          if (is_seen(c, b, t, s)) sum += std::exp(logit[s] - largest);
        for (std::int64_t i = v[h]; i < v[h + 1]; ++i) {
          double want = 0.0, size = 0.0;
          for (std::int64_t s = 0; s < c.keys; ++s) {
            if (!is_seen(c, b, t, s)) continue;
            const double part = std::exp(logit[s] - largest) / sum * value.at(b, s, i);
            want += part;
            size += std::fabs(part);
          }
          // Every weight is off by a factor of exp(+-2 error) (its own logit and the largest) and by that of
          // 2^x (2e-7), numerator and denominator alike; then one rounding for every key.
          const double off = std::expm1(2 * error) + 4e-7 + double(allowed + 4) * eps + narrow;
          const double got = y.at(b, t, y_at + i - v[h]), bound = 2 * off * size + 1e-30;
          CHECK(std::fabs(got - want) <= bound,
                "%s b=%ld q=%ld k=%ld qk=%ld v=%ld mask %d shared by %ld causal %d window %ld: sequence %ld "
                "head %ld query %ld channel %ld: %g, "
                "want %g within %g",
                name(isa), long(c.batch), long(c.queries), long(c.keys), long(d), long(c.v[h]), int(c.mask),
                long(shared), int(c.causal), long(c.window), long(b), long(each), long(t), long(i - v[h]),
                got, want, bound);
        }
      }
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t at = 0; at < y.batch_stride; ++at)
      if (at >= c.queries * y.stride || at % y.stride >= shared * v.back())
        CHECK(y.data[b * y.batch_stride + at] == kPoison, "%s: wrote between the rows", name(isa));
}

void run(Isa isa, Case c) {
  if (!is_a_copy(isa)) run_with(isa, c);
  c.arithmetic = Arithmetic::bf16;
  if (has_pairs(isa) || isa == Isa::generic) run_with(isa, c);
}

// Logits beyond fp32 and NaN stay in their own row; the rows beside them are as before.
void run_strange_rows(Isa isa, Arithmetic arithmetic) {
  const std::int64_t tokens = 41, channels = 20, first[] = {0, channels};
  std::vector<float> q = random_floats(tokens * channels, 1), k = random_floats(tokens * channels, 2);
  std::vector<float> v = random_floats(tokens * channels, 3), good(tokens * channels), y(tokens * channels);
  AttentionCall call;
  call.batch = call.heads = 1;
  call.queries = call.keys = tokens;
  call.qk_first = call.v_first = first;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.y = good.data();
  call.q_stride = call.k_stride = call.v_stride = call.y_stride = channels;
  call.arithmetic = arithmetic;
  compact_attention(isa, call);
  const float infinity = std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < tokens * channels; ++i) k[i] = std::fabs(k[i]) + 0.1f;
  compact_attention(isa, call);
  q[3 * channels] = kNaN;
  for (std::int64_t i = 0; i < channels; ++i) q[5 * channels + i] = -infinity;  // every logit -inf
  call.y = y.data();
  compact_attention(isa, call);
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t i = 0; i < channels; ++i) {
      const float got = y[t * channels + i];
      if (t == 3)
        CHECK(std::isnan(got), "%s: NaN of a query is lost", name(isa));
      else if (t == 5)
        CHECK(std::isfinite(got), "%s: -inf has become %g", name(isa), got);
      else
        CHECK(got == good[t * channels + i], "%s: row %ld has changed", name(isa), long(t));
    }
}

// The same of a lone query, whose heads are its rows.
void run_strange_heads(Isa isa) {
  const std::int64_t keys = 41, channels = 20, shared = 3, first[] = {0, channels};
  std::vector<float> q = random_floats(shared * channels, 1), k = random_floats(keys * channels, 2);
  const std::vector<float> v = random_floats(keys * channels, 3);
  std::vector<float> good(shared * channels), y(shared * channels);
  for (float& x : k) x = std::fabs(x) + 0.1f;
  AttentionCall call;
  call.batch = call.heads = call.queries = 1;
  call.keys = keys;
  call.shared_by = shared;
  call.qk_first = call.v_first = first;
  call.q = q.data();
  call.k = k.data();
  call.v = v.data();
  call.y = good.data();
  call.q_stride = call.y_stride = shared * channels;
  call.k_stride = call.v_stride = channels;
  compact_attention(isa, call);
  q[0] = kNaN;
  for (std::int64_t i = 0; i < channels; ++i) q[channels + i] = -std::numeric_limits<float>::infinity();
  call.y = y.data();
  compact_attention(isa, call);
  for (std::int64_t i = 0; i < channels; ++i) {
    CHECK(std::isnan(y[i]), "%s: NaN of a query is lost", name(isa));
    CHECK(std::isfinite(y[channels + i]), "%s: -inf has become %g", name(isa), y[channels + i]);
    CHECK(y[2 * channels + i] == good[2 * channels + i], "%s: another head has changed", name(isa));
  }
}

std::string refusal(std::vector<std::int64_t> qk, std::vector<std::int64_t> v, int threads,
                    std::int64_t shared_by = 1, std::int64_t queries = 1, std::int64_t window = -1) {
  AttentionCall call;
  call.batch = call.queries = call.keys = 1;
  call.heads = static_cast<std::int64_t>(qk.size()) - 1;
  call.qk_first = qk.data();
  call.v_first = v.data();
  call.y_stride = v.back();
  call.threads = threads;
  call.shared_by = shared_by;
  call.queries = queries;
  call.causal = window < 0;
  call.window = window;
  return message_of([&] { compact_attention(Isa::generic, call); });
}

}  // namespace

int main() {
  const std::vector<std::int64_t> ragged_qk{48, 0, 1, 3, 17, 64}, ragged_v{3, 48, 1, 0, 64, 33};
  for (Isa isa : supported_isas()) {
    for (std::int64_t tokens : {1, 5, 31, 32, 33, 129})
      for (Mask mask : {Mask::none, Mask::padding, Mask::holes, Mask::nothing_allowed})
        run(isa, {2, tokens, tokens, ragged_qk, ragged_v, mask, int(1 + tokens % 3)});
    for (std::int64_t queries = 1; queries <= 29; ++queries)
      run(isa, {1, queries, 30, {20}, {20}, Mask::none, 1});
    for (std::int64_t keys = 1; keys <= 70; ++keys) run(isa, {1, 3, keys, {9}, {5}, Mask::none, 1});
    Case biased{2, 33, 33, ragged_qk, ragged_v, Mask::none, 2};
    biased.biased = true;
    for (std::int64_t tokens : {1, 2, 33, 129, 600})
      for (Mask mask : {Mask::none, Mask::padding, Mask::holes, Mask::nothing_allowed})
        if (tokens < 600 || mask == Mask::holes) {
          biased.queries = biased.keys = tokens;
          biased.mask = mask;
          run(isa, biased);
        }
    biased.queries = 20;
    biased.causal = true;
    run(isa, biased);
    // Several blocks of keys, the last one short; few heads for many threads.
    for (Mask mask : {Mask::none, Mask::holes}) run(isa, {1, 17, 700, {20, 0}, {33, 8}, mask, 1});
    run(isa, {1, 700, 700, {12}, {17}, Mask::padding, 3});
    run(isa, {1, 9, 513, {8}, {8}, Mask::none, 1});
    // More than L2 holds: what comes next is prefetched.
    for (int threads : {1, 2}) run(isa, {12, 129, 129, ragged_qk, ragged_v, Mask::padding, threads});
    // Large logits: to one side and to both, block after block.
    run(isa, {1, 20, 600, {16}, {16}, Mask::none, 1, 1e4f});
    run(isa, {1, 20, 60, {16}, {16}, Mask::none, 1, 1e15f, 1e15f});
    run(isa, {1, 20, 60, {16}, {16}, Mask::none, 1, 1.0f, -2.0f});
    run(isa, {1, 20, 60, {16}, {16}, Mask::none, 1, 1.0f, 0.0f});
    run(isa, {0, 5, 5, {4}, {4}});
    run(isa, {2, 0, 5, {4}, {4}});
    run(isa, {2, 5, 0, {4, 3}, {4, 2}});  // no key at all: zeros
    run(isa, {1, 5, 5, {}, {}});
    run(isa, {1, 5, 5, {3, 4}, {0, 0}});
    for (Arithmetic arithmetic : {Arithmetic::fp32, Arithmetic::bf16}) run_strange_rows(isa, arithmetic);
    run_strange_heads(isa);
    // Decoders: grouped queries, the last tokens of all, one token, several blocks of keys, padding on both
    // sides.
    for (std::int64_t shared : {1, 3, 17})
      for (std::int64_t queries : {1, 2, 15, 33})
        for (Mask mask : {Mask::none, Mask::padding, Mask::holes, Mask::nothing_allowed})
          run(isa,
              {2, queries, 33, ragged_qk, ragged_v, mask, int(1 + queries % 3), 1.0f, 0.3f, shared, true});
    // A lone query without a mask: any number of keys, heads wider than four vectors.
    for (std::int64_t keys = 1; keys <= 35; ++keys)
      run(isa, {2, 1, keys, ragged_qk, ragged_v, Mask::none, 1, 1.0f, 0.3f, 3, true});
    run(isa, {2, 1, 700, {130, 0, 65}, {7, 129, 80}, Mask::none, 2, 1.0f, 0.3f, 2, true});
    for (std::int64_t shared : {1, 2, 3, 4, 5})  // up to four in place, then tiles; more than a block of keys
      for (Mask mask : {Mask::none, Mask::holes})
        run(isa, {2, 1, 450, {50, 17}, {49, 9}, mask, 2, 1.0f, 0.3f, shared, true});
    run(isa, {1, 1, 600, {16}, {16}, Mask::none, 1, 1e4f, 0.3f, 1, true});
    run(isa, {1, 1, 60, {16}, {16}, Mask::none, 1, 1e15f, 1e15f, 2, true});
    run(isa, {1, 300, 300, {20, 0}, {33, 8}, Mask::none, 2, 1.0f, 0.3f, 2, true});
    run(isa, {1, 40, 600, {20}, {33}, Mask::holes, 1, 1.0f, 0.3f, 2, true});
    run(isa, {1, 20, 600, {16}, {16}, Mask::none, 1, 1e4f, 0.3f, 1, true});
    run(isa, {2, 7, 9, ragged_qk, ragged_v, Mask::none, 2, 1.0f, 0.3f, 4, false});
    // Windows: none of them, one key, odd ones, more than a block of keys apart, with keys that are not
    // allowed.
    for (std::int64_t window : {0, 1, 8, 33, 128})
      for (Mask mask : {Mask::none, Mask::padding, Mask::holes})
        run(isa,
            {2, 129, 129, {20, 0}, {33, 8}, mask, 2, 1.0f, 0.3f, 2, false, Arithmetic::fp32, false, window});
    run(isa, {1, 600, 600, {5}, {9}, Mask::none, 2, 1.0f, 0.3f, 1, false, Arithmetic::fp32, false, 40});
    run(isa, {1, 600, 600, {5}, {9}, Mask::padding, 2, 1.0f, 0.3f, 1, false, Arithmetic::fp32, false, 300});
    run(isa,
        {2, 9, 9, ragged_qk, ragged_v, Mask::none, 1, 1.0f, 0.3f, 1, false, Arithmetic::fp32, false, 1000});
    run(isa, {1, 1, 1, {4}, {4}, Mask::none, 1, 1.0f, 0.3f, 1, false, Arithmetic::fp32, false, 0});
  }
  const std::string start = "compact_attention: ";
  CHECK(refusal({0, 4, 3}, {0, 4, 8}, 1) == start + "qk_first must not descend (got 3 after 4 at position 2)",
        "qk");
  CHECK(refusal({0, 4}, {1, 4}, 1) == start + "v_first must start with 0", "v");
  CHECK(refusal({0, 4}, {0, 4}, 0) == start + "threads must be at least 1 (got 0)", "threads");
  CHECK(refusal({0, 4}, {0, 4}, 1, 0) == start + "shared_by must be at least 1 (got 0)", "shared_by");
  AttentionCall biased;
  const std::int64_t first[] = {0, 1};
  const float bias = 0.0f;
  biased.batch = biased.queries = biased.keys = biased.heads = biased.y_stride = 1;
  biased.qk_first = biased.v_first = first;
  biased.bias = &bias;
  CHECK(message_of([&] { compact_attention(Isa::generic, biased); }) ==
            start + "a bias needs bias_head, and shared_by of 1",
        "bias");
  CHECK(refusal({0, 4}, {0, 4}, 1, 1, 2) == start + "queries must be at most keys where causal", "causal");
  CHECK(refusal({0, 4}, {0, 4}, 1, 1, 2, 3) ==
            start + "queries must be as many as keys, and not causal, with a window",
        "window");
  return 0;
}
