// disentangled_attention against float64, every instruction set: ragged heads, odd sizes, masks, strides,
// either term or none, several blocks of queries and of keys, threads.
#include <algorithm>
#include <memory>

#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;

enum class Mask { none, padding, holes, one_sequence };
enum Terms { kNone = 0, kKey = 1, kQuery = 2, kBoth = 3 };

struct Case {
  std::int64_t batch, tokens;
  std::vector<std::int64_t> qk, v;  // channels of each head
  Mask mask = Mask::none;
  int terms = kBoth;
  int threads = 1;
  std::int64_t gap = 7;  // between rows
  Arithmetic arithmetic = Arithmetic::fp32;
};

bool has_pairs(Isa isa) { return isa >= Isa::avx512_bf16 && bf16_verdict().pays; }
bool is_a_copy(Isa isa) { return isa == Isa::avx2_vnni || isa > Isa::avx512; }

std::vector<std::int64_t> firsts(const std::vector<std::int64_t>& widths) {
  std::vector<std::int64_t> first{0};
  for (std::int64_t width : widths) first.push_back(first.back() + width);
  return first;
}

bool is_token(Mask mask, std::int64_t b, std::int64_t t, std::int64_t tokens) {
  if (mask == Mask::padding) return t < std::max<std::int64_t>(1, tokens - 1 - b * tokens / 3);
  if (mask == Mask::holes) return (t * 7 + b) % 3 != 0;
  return mask == Mask::none || b % 2 == 1;
}

void run_with(Isa isa, const Case& c) {
  const std::vector<std::int64_t> qk = firsts(c.qk), v = firsts(c.v);
  const std::int64_t T = c.tokens, C = qk.back(), D = v.back();
  const std::int64_t stride = C + c.gap, v_stride = D + 3, y_stride = D + 5;
  const std::vector<float> q = random_floats(c.batch * T * stride + 1, 1),
                           k = random_floats(c.batch * T * stride + 1, 2);
  const std::vector<float> value = random_floats(c.batch * T * v_stride + 1, 3);
  const std::vector<float> key = random_floats(2 * T * stride, 4), query = random_floats(2 * T * stride, 5);
  std::vector<float> y(c.batch * T * y_stride + 1, kPoison);
  const std::int64_t mask_stride = T + 5;
  std::unique_ptr<bool[]> mask(new bool[c.batch * mask_stride + 1]());
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t t = 0; t < T; ++t) mask[b * mask_stride + t] = is_token(c.mask, b, t, T);

  DisentangledCall call;
  call.batch = c.batch;
  call.tokens = T;
  call.heads = static_cast<std::int64_t>(c.qk.size());
  call.qk_first = qk.data();
  call.v_first = v.data();
  call.q = q.data();
  call.k = k.data();
  call.v = value.data();
  call.y = y.data();
  call.q_stride = call.k_stride = stride;
  call.v_stride = v_stride;
  call.y_stride = y_stride;
  call.q_batch_stride = call.k_batch_stride = T * stride;
  call.v_batch_stride = T * v_stride;
  call.y_batch_stride = T * y_stride;
  call.pos_key = c.terms & kKey ? key.data() : nullptr;
  call.pos_query = c.terms & kQuery ? query.data() : nullptr;
  call.pos_key_stride = call.pos_query_stride = stride;
  call.token_mask = c.mask == Mask::none ? nullptr : mask.get();
  call.token_mask_stride = mask_stride;
  call.scale = 0.2f;
  call.threads = c.threads;
  call.arithmetic = c.arithmetic;
  disentangled_attention(isa, call);

  // What bf16 rounds: both factors of each term, powers, v, by half a step of 2^-8 each.
  const double narrow = c.arithmetic == Arithmetic::bf16 && has_pairs(isa) ? 0x1.02p-8 : 0.0, eps = 0x1p-24;
  std::vector<double> logit(T);
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t h = 0; h < call.heads; ++h)
      for (std::int64_t i = 0; i < T; ++i) {
        const bool averages = !is_token(c.mask, b, i, T);
        double largest = -std::numeric_limits<double>::infinity(), error = 0.0, sum = 0.0;
        for (std::int64_t j = 0; j < T; ++j) {
          double size = 0.0;
          logit[j] = 0.0;
          if (!averages && !is_token(c.mask, b, j, T)) {
            logit[j] = -std::numeric_limits<double>::infinity();
            continue;
          }
          for (std::int64_t n = qk[h]; n < qk[h + 1] && !averages; ++n) {
            const double qi = q[(b * T + i) * stride + n], kj = k[(b * T + j) * stride + n];
            const std::int64_t row = (T - 1 + i - j) * stride + n;
            for (double product :
                 {qi * kj, c.terms & kKey ? qi * key[row] : 0.0, c.terms & kQuery ? kj * query[row] : 0.0}) {
              logit[j] += double(call.scale) * product;
              size += std::fabs(double(call.scale) * product);
            }
          }
          largest = std::max(largest, logit[j]);
          error = std::max(error, (double(c.qk[h] + 8) * eps + narrow) * size);
        }
        for (double one : logit) sum += std::exp(one - largest);
        for (std::int64_t n = v[h]; n < v[h + 1]; ++n) {
          double want = 0.0, size = 0.0;
          for (std::int64_t j = 0; j < T; ++j) {
            const double part = std::exp(logit[j] - largest) / sum * value[(b * T + j) * v_stride + n];
            want += part;
            size += std::fabs(part);
          }
          const double off = std::expm1(2 * error) + 4e-7 + double(T + 4) * eps + narrow;
          const double got = y[(b * T + i) * y_stride + n], bound = 2 * off * size + 1e-30;
          CHECK(std::fabs(got - want) <= bound,
                "%s b=%ld t=%ld qk=%ld v=%ld mask %d terms %d: sequence %ld head %ld query %ld channel %ld: "
                "%g, "
                "want %g within %g",
                name(isa), long(c.batch), long(T), long(c.qk[h]), long(c.v[h]), int(c.mask), c.terms, long(b),
                long(h), long(i), long(n - v[h]), got, want, bound);
        }
      }
  for (std::size_t at = 0; at < y.size(); ++at)
    if (static_cast<std::int64_t>(at) >= c.batch * T * y_stride ||
        static_cast<std::int64_t>(at) % y_stride >= D)
      CHECK(y[at] == kPoison, "%s: wrote between the rows", name(isa));
}

void run(Isa isa, Case c) {
  if (!is_a_copy(isa)) run_with(isa, c);
  c.arithmetic = Arithmetic::bf16;
  if (has_pairs(isa) || isa == Isa::generic) run_with(isa, c);
}

std::string refusal(std::vector<std::int64_t> qk, std::vector<std::int64_t> v, int threads,
                    float scale = 1.0f) {
  DisentangledCall call;
  call.batch = call.tokens = 1;
  call.heads = static_cast<std::int64_t>(qk.size()) - 1;
  call.qk_first = qk.data();
  call.v_first = v.data();
  call.y_stride = v.back();
  call.threads = threads;
  call.scale = scale;
  return message_of([&] { disentangled_attention(Isa::generic, call); });
}

}  // namespace

int main() {
  const std::vector<std::int64_t> ragged_qk{20, 0, 1, 17, 5}, ragged_v{3, 20, 1, 0, 33};
  for (Isa isa : supported_isas()) {
    for (std::int64_t tokens : {1, 2, 5, 31, 32, 33, 65, 129})
      for (Mask mask : {Mask::none, Mask::padding, Mask::holes, Mask::one_sequence})
        run(isa, {2, tokens, ragged_qk, ragged_v, mask, kBoth, int(1 + tokens % 3)});
    for (int terms : {kNone, kKey, kQuery})
      for (std::int64_t tokens : {1, 15, 40})
        run(isa, {2, tokens, ragged_qk, ragged_v, Mask::padding, terms});
    for (std::int64_t tokens = 1; tokens <= 70; ++tokens) run(isa, {1, tokens, {9}, {5}});
    // Several blocks of queries and of keys, the last ones short; few heads for many threads.
    for (Mask mask : {Mask::none, Mask::holes, Mask::padding})
      run(isa, {1, 300, {12, 0}, {9, 4}, mask, kBoth, 3});
    run(isa, {1, 530, {6}, {4}, Mask::none, kBoth, 1});
    run(isa, {2, 37, {48}, {64}, Mask::none, kBoth, 1, 1024 - 48});  // rows a page apart
    run(isa, {0, 5, {4}, {4}});
    run(isa, {2, 0, {4}, {4}});
    run(isa, {1, 5, {}, {}});
    run(isa, {1, 5, {3, 4}, {0, 0}});
  }
  const std::string start = "disentangled_attention: ";
  CHECK(refusal({0, 4, 3}, {0, 4, 8}, 1) == start + "qk_first must not descend (got 3 after 4 at position 2)",
        "qk");
  CHECK(refusal({0, 4}, {1, 4}, 1) == start + "v_first must start with 0", "v");
  CHECK(refusal({0, 4}, {0, 4}, 0) == start + "threads must be at least 1 (got 0)", "threads");
  CHECK(refusal({0, 4}, {0, 4}, 1, std::numeric_limits<float>::infinity()) ==
            start + "scale must be finite (got inf)",
        "scale");
  return 0;
}
