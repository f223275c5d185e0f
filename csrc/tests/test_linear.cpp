// compact_linear against float64, every instruction set: odd shapes, strides, indices, options, threads.
#include <algorithm>

#include "check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;

struct Case {
  std::int64_t m, n, k;
  bool in_index, out_index, bias, residual;
  Activation activation;
  int threads;
};

void run(Isa isa, const Case& c) {
  const std::int64_t in_features = c.in_index ? c.k + 9 : c.k, n_out = c.out_index ? c.n + 50 : c.n;
  const std::int64_t x_stride = in_features + 3, y_stride = n_out + 5;
  std::vector<float> x = random_floats(c.m * x_stride, 1), bias = random_floats(c.n, 3);
  const std::vector<float> weight = random_floats(c.n * c.k, 2);
  const std::vector<float> residual = random_floats(c.m * y_stride, 4);
  const std::vector<std::int64_t> in_index = random_kept(c.k, in_features, 5);
  const std::vector<std::int64_t> out_index = random_kept(c.n, n_out, 6);
  // Columns of x that nothing may read: past the end of each row, and those in_index leaves out.
  for (std::int64_t r = 0; r < c.m; ++r)
    for (std::int64_t i = 0; i < x_stride; ++i)
      if (i >= in_features || (c.in_index && !std::binary_search(in_index.begin(), in_index.end(), i)))
        x[r * x_stride + i] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> packed(packed_bytes(isa, WeightType::fp32, c.n, c.k) / 4, kPoison),
      y(c.m * y_stride + 64, kPoison);
  pack_weight(isa, WeightType::fp32, weight.data(), c.k, 1, c.n, c.k, packed.data(), nullptr);

  LinearCall call;
  call.m = c.m;
  call.in_features = in_features;
  call.weight.k = c.k;
  call.weight.n = c.n;
  call.n_out = n_out;
  call.x = x.data();
  call.x_stride = x_stride;
  call.weight.data = packed.data();
  call.weight.bias = c.bias ? bias.data() : nullptr;
  call.in_index = c.in_index ? in_index.data() : nullptr;
  call.out_index = c.out_index ? out_index.data() : nullptr;
  call.residual = c.residual ? residual.data() : nullptr;
  call.residual_stride = y_stride;
  call.y = y.data();
  call.y_stride = y_stride;
  call.activation = c.activation;
  call.threads = c.threads;
  compact_linear(isa, call);

  const double eps = 0x1p-24;
  for (std::int64_t r = 0; r < c.m; ++r) {
    std::vector<double> expected(n_out, 0.0), bound(n_out, 0.0);
    for (std::int64_t i = 0; i < c.n; ++i) {
      double sum = c.bias ? bias[i] : 0.0, size = std::fabs(sum);
      for (std::int64_t j = 0; j < c.k; ++j) {
        const double product = double(x[r * x_stride + (c.in_index ? in_index[j] : j)]) * weight[i * c.k + j];
        sum += product;
        size += std::fabs(product);
      }
      const std::int64_t column = c.out_index ? out_index[i] : i;
      expected[column] = activate_reference(c.activation, sum);
      // k + 1 roundings of at most eps times the partial sums, then the activation (slope under 1.2, own
      // error under 1e-6 of its value).
      bound[column] = 1.2 * (c.k + 1) * eps * size + 1e-6 * std::fabs(expected[column]);
    }
    for (std::int64_t i = 0; i < y_stride; ++i) {
      const float got = y[r * y_stride + i];
      if (i >= n_out) {
        CHECK(got == kPoison, "%s: wrote past row %ld", name(isa), long(r));
        continue;
      }
      const double extra = c.residual ? residual[r * y_stride + i] : 0.0;
      const double want = expected[i] + extra, allowed = bound[i] + eps * std::fabs(want);
      CHECK(std::fabs(got - want) <= allowed,
            "%s m=%ld n=%ld k=%ld row %ld column %ld: %g, want %g within %g", name(isa), long(c.m), long(c.n),
            long(c.k), long(r), long(i), got, want, allowed);
    }
  }
  CHECK(std::all_of(y.end() - 64, y.end(), [](float v) { return v == kPoison; }), "overrun");
}

std::string refusal(std::vector<std::int64_t> index, bool is_out, std::int64_t size) {
  const std::int64_t count = static_cast<std::int64_t>(index.size());
  std::vector<float> values(4096, 0.0f);
  LinearCall call;
  call.m = 1;
  call.in_features = is_out ? count : size;
  call.weight.k = count;
  call.weight.n = count;
  call.n_out = is_out ? size : count;
  call.x = call.weight.data = values.data();
  call.x_stride = call.in_features;
  (is_out ? call.out_index : call.in_index) = index.data();
  call.y = values.data();
  call.y_stride = call.n_out;
  return message_of([&] { compact_linear(Isa::generic, call); });
}

}  // namespace

int main() {
  for (Isa isa : supported_isas()) {
    for (std::int64_t m : {0, 1, 5, 16, 129})
      for (std::int64_t n : {0, 1, 33, 577})
        for (std::int64_t k : {0, 1, 3, 372})
          for (int options = 0; options < 16; ++options) {
            if (m * n * k > 1000000 && options != 0 && options != 5 && options != 15) continue;
            const Activation activation = static_cast<Activation>((m + n + k + options) % 5);
            run(isa, {m, n, k, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, (options & 8) != 0,
                      activation, 1 + options % 3});
          }
    // Every tile height, and a stride of whole pages (rows are copied first).
    for (std::int64_t m = 1; m <= 30; ++m)
      run(isa, {m, 40, 29, false, true, true, true, Activation::gelu, 1});
    run(isa, {33, 17, 1021, false, false, true, false, Activation::none, 1});
    // More rows than one block holds.
    run(isa, {300, 20, 65, true, true, true, true, Activation::silu, 2});
  }
  for (bool is_out : {false, true}) {
    const std::string start = std::string("compact_linear: ") + (is_out ? "out_index" : "in_index");
    CHECK(refusal({1, 5, 801}, is_out, 768) == start + " must be sorted and < 768 (got 801 at position 2)",
          "high");
    CHECK(refusal({1, 5, 5}, is_out, 768) == start + " must be sorted and < 768 (got 5 at position 2)",
          "twice");
    CHECK(refusal({7, 5, 9}, is_out, 768) == start + " must be sorted and < 768 (got 5 at position 1)",
          "order");
    CHECK(refusal({-1, 5}, is_out, 768) == start + " must be sorted and < 768 (got -1 at position 0)",
          "negative");
  }
  return 0;
}
