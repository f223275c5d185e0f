// A C++ deployment: pack weights once, run a compact layer and a compact MLP, compare both with plain loops.
#include <prunekern/prunekern.h>

#include <cmath>
#include <cstdio>
#include <random>

using Floats = std::vector<float>;
constexpr auto kType = prunekern::WeightType::fp32;
// kKept of kHidden outputs are left.
constexpr std::int64_t kRows = 5, kHidden = 96, kKept = 70, kInner = 201;

Floats random(std::int64_t count, double scale) {
  static std::mt19937 engine(0);
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  Floats values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

struct Layer {  // n x k weights: plain, and laid out for this CPU
  std::int64_t n, k;
  Floats weight = random(n * k, std::pow(k, -0.5)), bias = random(n, 1);
  std::vector<char> packed = std::vector<char>(packed_bytes(prunekern::active_isa(), kType, n, k));

  prunekern::Packed pack() {
    pack_weight(prunekern::active_isa(), kType, weight.data(), k, 1, n, k, packed.data(), nullptr);
    return {kType, n, k, packed.data(), nullptr, bias.data()};
  }
  Floats plain(const Floats& x) const {  // x [rows, k] -> [rows, n]
    Floats y(kRows * n);
    for (std::int64_t i = 0; i < kRows * n; ++i) {
      double sum = bias[i % n];
      for (std::int64_t j = 0; j < k; ++j) sum += double(x[i / n * k + j]) * weight[i % n * k + j];
      y[i] = static_cast<float>(sum);
    }
    return y;
  }
};

// What a layer and an MLP have in common: y = scatter(... x ...) + x, both [rows, hidden].
template <class Call>
void aim(Call& call, const Floats& x, Floats& y, const std::vector<std::int64_t>& kept) {
  call.m = kRows, call.in_features = call.n_out = kHidden;
  call.x = call.residual = x.data(), call.y = y.data(), call.out_index = kept.data();
  call.x_stride = call.residual_stride = call.y_stride = kHidden;
}

int main() {
  Layer single{kKept, kHidden}, up{kInner, kHidden}, down{kKept, kInner};
  const Floats x = random(kRows * kHidden, 1);
  Floats y(kRows * kHidden, NAN), z = y, y_plain = x, z_plain = x;
  std::vector<std::int64_t> kept(kKept);  // output i of the layer is channel kept[i]
  for (std::int64_t i = 0; i < kKept; ++i) kept[i] = i * kHidden / kKept;

  prunekern::LinearCall linear;
  aim(linear, x, y, kept);
  linear.weight = single.pack(), linear.activation = prunekern::Activation::relu;
  prunekern::compact_linear(linear);

  prunekern::MlpCall mlp;
  aim(mlp, x, z, kept);
  mlp.up = up.pack(), mlp.down = down.pack(), mlp.activation = prunekern::Activation::relu;
  prunekern::compact_mlp(mlp);

  Floats inner = up.plain(x);
  for (float& value : inner) value = std::fmax(value, 0.0f);
  const Floats y_kept = single.plain(x), z_kept = down.plain(inner);
  for (std::int64_t i = 0; i < kRows * kKept; ++i) {
    y_plain[i / kKept * kHidden + kept[i % kKept]] += std::fmax(y_kept[i], 0.0f);
    z_plain[i / kKept * kHidden + kept[i % kKept]] += z_kept[i];
  }
  bool right = true;  // 1e-4: sums of 201 products of size 1 in fp32 differ by about 1e-6
  for (std::int64_t i = 0; i < kRows * kHidden; ++i)
    right &= std::fabs(y[i] - y_plain[i]) < 1e-4 && std::fabs(z[i] - z_plain[i]) < 1e-4;
  std::printf("%s kernels: %s\n", prunekern::name(prunekern::active_isa()), right ? "right" : "WRONG");
  return right ? 0 : 1;
}
