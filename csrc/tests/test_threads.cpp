// Several callers at once, each with two threads of its own, in a process that called nothing before: what
// one of them gets must not depend on the others. Says most under ThreadSanitizer (make sanitize).
#include <thread>

#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr std::int64_t kRows = 70, kHidden = 64, kInner = 203, kHeads = 4;

struct Layer {
  std::int64_t n, k;
  WeightType type;
  std::vector<float> scale, bias = random_floats(n, 2);
  std::vector<char> packed;

  Layer(std::int64_t outputs, std::int64_t inputs, WeightType type)
      : n(outputs), k(inputs), type(type), scale(n), packed(packed_bytes(active_isa(), type, n, k)) {
    const std::vector<float> weight = random_floats(n * k, 1);
    pack_weight(active_isa(), type, weight.data(), k, 1, n, k, packed.data(), scale.data());
  }
  Packed get() const { return {type, n, k, packed.data(), scale.data(), bias.data()}; }
};

template <class Call>
void aim(Call& call, std::int64_t m, std::int64_t n, const std::vector<float>& x, std::vector<float>& y,
         int threads) {
  call.m = m, call.in_features = call.x_stride = kHidden, call.n_out = call.y_stride = n;
  call.x = x.data(), call.y = y.data(), call.threads = threads;
}

// y of an MLP, attention over it, and a linear for few rows and many, one after the other.
std::vector<float> everything(WeightType type, int threads) {
  const Layer up(kInner, kHidden, type), down(kHidden, kInner, type);
  const std::vector<float> x = random_floats(kRows * kHidden, 3);
  std::vector<float> y(kRows * kHidden), z(kRows * kHidden), all;
  MlpCall mlp;
  aim(mlp, kRows, kHidden, x, y, threads);
  mlp.up = up.get(), mlp.down = down.get();
  compact_mlp(mlp);

  const std::vector<std::int64_t> first{0, 1, 20, 20, kHidden};
  AttentionCall attention;
  attention.batch = 1, attention.queries = attention.keys = kRows, attention.heads = kHeads;
  attention.qk_first = attention.v_first = first.data();
  attention.q = attention.k = x.data(), attention.v = y.data(), attention.y = z.data();
  attention.q_stride = attention.k_stride = attention.v_stride = attention.y_stride = kHidden;
  attention.q_batch_stride = attention.k_batch_stride = kRows * kHidden;
  attention.v_batch_stride = attention.y_batch_stride = kRows * kHidden;
  attention.threads = threads;
  compact_attention(attention);
  all = z;
  for (std::int64_t m : {std::int64_t(1), kRows}) {
    std::vector<float> w(m * kInner);
    LinearCall linear;
    aim(linear, m, kInner, z, w, threads);
    linear.weight = up.get(), linear.activation = Activation::silu;
    compact_linear(linear);
    all.insert(all.end(), w.begin(), w.end());
  }
  return all;
}

}  // namespace

int main() {
  const WeightType types[] = {WeightType::fp32, WeightType::bf16, WeightType::int8};
  constexpr int kCallers = 3, kTimes = 5;
  std::vector<float> got[kCallers];
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i)
    callers.emplace_back([&, i] {
      for (int time = 0; time < kTimes; ++time) got[i] = everything(types[i], 2);
    });
  for (std::thread& caller : callers) caller.join();
  for (int i = 0; i < kCallers; ++i) {
    const std::vector<float> alone = everything(types[i], 1);
    CHECK(got[i].size() == alone.size(), "%zu", got[i].size());
    for (std::size_t j = 0; j < alone.size(); ++j)
      CHECK(std::fabs(got[i][j] - alone[j]) <= 1e-4f * (1 + std::fabs(alone[j])), "%s, %zu: %g, alone %g",
            name(types[i]), j, got[i][j], alone[j]);
  }
  return 0;
}
