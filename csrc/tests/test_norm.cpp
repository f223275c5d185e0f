// rms_norm against float64: odd sizes, strides, threads, rows of zeros.
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

std::string refusal(NormCall call) {
  return message_of([&] { rms_norm(call); });
}

}  // namespace

int main() {
  for (std::int64_t n : {1, 5, 15, 16, 17, 372, 577})
    for (std::int64_t rows : {1, 5, 129}) run(rows, n, 1e-5f, int(1 + rows % 3));
  run(301, 577, 1e-6f, 3);
  run(0, 5, 1e-6f, 1);
  NormCall call;
  call.threads = 0;
  CHECK(refusal(call) == "rms_norm: threads must be at least 1 (got 0)", "threads");
  call.rows = -1;
  CHECK(refusal(call) == "rms_norm: sizes must not be negative", "rows");
  return 0;
}
