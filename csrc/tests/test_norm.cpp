// rms_norm and layer_norm against float64: odd sizes, strides, threads, rows of zeros.
#include <algorithm>

#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;

void run(std::int64_t rows, std::int64_t n, float eps, int threads) {
  const std::int64_t stride = n + 3;
  std::vector<float> x = random_floats(rows * stride + 1, 1);
  const std::vector<float> weight = random_floats(n, 2);
  for (std::int64_t j = 0; rows > 2 && j < n; ++j) x[2 * stride + j] = 0.0f;
  std::vector<float> y(rows * n + 9, kPoison);
  rms_norm({rows, n, x.data(), stride, weight.data(), eps, y.data(), threads});
  for (std::int64_t r = 0; r < rows; ++r) {
    double squares = 0.0;
    for (std::int64_t j = 0; j < n; ++j) squares += double(x[r * stride + j]) * x[r * stride + j];
    for (std::int64_t j = 0; j < n; ++j) {
      const double want = weight[j] * x[r * stride + j] / std::sqrt(squares / double(n) + double(eps));
      // n / 16 + 18 sums and the mean, halved by the root; root, division and two products.
      const double bound = 0x1p-24 * ((double(n) / 16 + 21) / 2 + 4) * std::fabs(want);
      CHECK(std::fabs(y[r * n + j] - want) <= bound, "rows %ld n %ld: row %ld channel %ld", long(rows),
            long(n), long(r), long(j));
    }
  }
  for (std::size_t i = y.size() - 9; i < y.size(); ++i) CHECK(y[i] == kPoison, "wrote past the end");
  // In place.
  std::vector<float> same(rows * n);
  for (std::int64_t r = 0; r < rows; ++r) std::copy_n(&x[r * stride], n, &same[r * n]);
  rms_norm({rows, n, same.data(), n, weight.data(), eps, same.data(), threads});
  for (std::int64_t i = 0; i < rows * n; ++i) CHECK(same[i] == y[i], "in place");
}

void run_layer(Isa isa, std::int64_t rows, std::int64_t n, float offset, int threads) {
  const std::int64_t stride = n + 3;
  std::vector<float> x = random_floats(rows * stride + 1, 1);
  for (float& value : x) value += offset;
  const std::vector<float> weight = random_floats(n, 2), bias = random_floats(n, 3);
  for (std::int64_t j = 0; rows > 2 && j < n; ++j) x[2 * stride + j] = 5.0f;  // no variance at all
  std::vector<float> y(rows * n + 9, kPoison);
  const float eps = 1e-12f;
  layer_norm(isa, {rows, n, x.data(), stride, weight.data(), bias.data(), eps, y.data(), threads});
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = &x[r * stride];
    double mean = 0.0, variance = 0.0, largest = 0.0;
    for (std::int64_t j = 0; j < n; ++j) mean += row[j] / double(n);
    for (std::int64_t j = 0; j < n; ++j) {
      variance += (row[j] - mean) * (row[j] - mean) / double(n);
      largest = std::fmax(largest, std::fabs(row[j]));
    }
    const double inverse = 1.0 / std::sqrt(variance + double(eps));
    for (std::int64_t j = 0; j < n; ++j) {
      const double normed = (row[j] - mean) * inverse, want = weight[j] * normed + bias[j];
      // The mean is off by n / 64 + 20 roundings of the largest value, which moves every value so, and the
      // variance by the square of that: nothing beside the n / 64 + 24 roundings of its own, halved by the
      // root.
      const double off = 0x1p-24 * (double(n) / 64 + 24) * largest * inverse;
      const double bound =
          std::fabs(weight[j]) * (off + 0x1p-24 * (double(n) / 64 + 32) * std::fabs(normed)) +
          0x1p-23 * std::fabs(want);
      CHECK(std::fabs(y[r * n + j] - want) <= bound,
            "%s rows %ld n %ld: row %ld channel %ld: %g, want %g within %g", name(isa), long(rows), long(n),
            long(r), long(j), y[r * n + j], want, bound);
    }
  }
  for (std::size_t i = y.size() - 9; i < y.size(); ++i) CHECK(y[i] == kPoison, "wrote past the end");
  std::vector<float> same(rows * n);
  for (std::int64_t r = 0; r < rows; ++r) std::copy_n(&x[r * stride], n, &same[r * n]);
  layer_norm(isa, {rows, n, same.data(), n, weight.data(), bias.data(), eps, same.data(), threads});
  for (std::int64_t i = 0; i < rows * n; ++i) CHECK(same[i] == y[i], "in place");
  const std::vector<float> zeros(n);
  std::vector<float> unbiased(rows * n);
  layer_norm(isa, {rows, n, x.data(), stride, weight.data(), zeros.data(), eps, same.data(), threads});
  layer_norm(isa, {rows, n, x.data(), stride, weight.data(), nullptr, eps, unbiased.data(), threads});
  for (std::int64_t i = 0; i < rows * n; ++i) CHECK(unbiased[i] == same[i], "without a bias");
}

std::string refusal(NormCall call) {
  return message_of([&] { rms_norm(call); });
}

}  // namespace

int main() {
  for (std::int64_t n : {1, 5, 15, 16, 17, 372, 577})
    for (std::int64_t rows : {1, 5, 129}) run(rows, n, 1e-5f, int(1 + rows % 3));
  run(301, 577, 1e-6f, 3);
  run(0, 5, 1e-6f, 1);
  for (Isa isa : supported_isas())
    for (std::int64_t n : {1, 5, 16, 17, 64, 372, 577, 768})
      for (std::int64_t rows : {1, 5, 129})
        run_layer(isa, rows, n, n % 2 == 0 ? 0.0f : 30.0f, int(1 + rows % 3));
  LayerNormCall layer;
  layer.eps = -1.0f;
  const std::string message = message_of([&] { layer_norm(Isa::generic, layer); });
  CHECK(message == "layer_norm: eps must be finite and not negative (got -1.000000)", "%s", message.c_str());
  NormCall call;
  call.threads = 0;
  CHECK(refusal(call) == "rms_norm: threads must be at least 1 (got 0)", "threads");
  call.rows = -1;
  CHECK(refusal(call) == "rms_norm: sizes must not be negative", "rows");
  return 0;
}
