// The activations against float64 over the whole range of fp32. k = 1 and a weight of 1 leave x as it is.
#include "tests/check.h"

using namespace prunekern;

namespace {

std::vector<float> apply(Isa isa, Activation activation, const std::vector<float>& x) {
  const float one = 1.0f;
  std::vector<float> packed(packed_bytes(isa, WeightType::fp32, 1, 1) / 4), y(x.size());
  pack_weight(isa, WeightType::fp32, &one, 1, 1, 1, 1, packed.data(), nullptr);
  LinearCall call;
  call.m = static_cast<std::int64_t>(x.size());
  call.in_features = call.weight.k = call.weight.n = call.n_out = 1;
  call.x = x.data();
  call.x_stride = call.y_stride = 1;
  call.weight.data = packed.data();
  call.y = y.data();
  call.activation = activation;
  compact_linear(isa, call);
  return y;
}

// How much a relative error of x in the exponential is magnified there: exp(-2 z) cannot be better than z *
// eps.
double conditioning(Activation activation, double x) {
  if (x > 0) return 1.0;
  if (activation == Activation::quick_gelu) return 1.0 + 0.5 * std::fabs(x);
  if (activation != Activation::gelu_tanh) return 1.0;
  return 1.0 + 0.5 * std::fabs(x + 0.044715 * x * x * x);
}

}  // namespace

int main() {
  std::vector<float> x;
  for (double size = 1e-38; size < 3e38; size *= 1.07)
    for (double sign : {-1.0, 1.0}) x.push_back(static_cast<float>(sign * size));
  for (double value = -120.0; value <= 120.0; value += 0.00173) x.push_back(static_cast<float>(value));
  const float infinity = std::numeric_limits<float>::infinity();
  for (float value : {0.0f, -0.0f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN(),
                      std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest()})
    x.push_back(value);
  const Activation all[] = {Activation::none,      Activation::relu, Activation::gelu,
                            Activation::gelu_tanh, Activation::silu, Activation::quick_gelu};
  for (Isa isa : supported_isas())
    for (Activation activation : all) {
      const std::vector<float> y = apply(isa, activation, x);
      double worst = 0.0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double want = activate_reference(activation, x[i]);
        const int which = static_cast<int>(activation);
        if (std::isnan(x[i])) {
          CHECK(std::isnan(y[i]), "%s activation %d: nan became %g", name(isa), which, y[i]);
          continue;
        }
        // inf * 0 in all but relu and none: nan, as in PyTorch, or the limit, to what fp32 has of it.
        if (x[i] == -infinity) {
          CHECK(std::isnan(y[i]) || y[i] == static_cast<float>(want) ||
                    (std::fabs(y[i]) < 1e-36f && activation != Activation::none),
                "%s activation %d of -inf: %g", name(isa), which, y[i]);
          continue;
        }
        if (std::isinf(x[i])) {
          CHECK(y[i] == infinity, "%s activation %d of inf: %g", name(isa), which, y[i]);
          continue;
        }
        if (x[i] == 0) CHECK(y[i] == 0, "%s activation %d of 0: %g", name(isa), which, y[i]);
        // Below 1e-36 fp32 runs out of normal numbers.
        const double error = std::fabs(y[i] - want),
                     allowed = 1e-6 * conditioning(activation, x[i]) * std::fabs(want);
        CHECK(error <= allowed + 1e-36, "%s activation %d of %.9g: %.9g, want %.9g", name(isa), which, x[i],
              y[i], want);
        if (std::fabs(want) > 1e-30)
          worst = std::fmax(worst, error / std::fabs(want) / conditioning(activation, x[i]));
      }
      std::printf("%-8s activation %d: largest relative error %.2g\n", name(isa),
                  static_cast<int>(activation), worst);
    }
  return 0;
}
