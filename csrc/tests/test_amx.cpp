// AMX: the guard around its self-test, what the self-test catches, and the product against float64. On
// machines without AMX the tiles are emulated (amx_emulator.h).
#include <signal.h>

#include <algorithm>
#include <cstring>

#include "cpu/amx_probe.h"
#include "cpu/guarded.h"
#include "cpu/table.h"
#include "loops/products.h"
#include "tests/amx_emulator.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr double kEps = 0x1p-24, kEpsBf16 = 0x1p-8, kDenormal = 0x1p-126;
constexpr float kPoison = 1e30f;

volatile int handled = 0;
volatile int* volatile nowhere = nullptr;
__attribute__((no_sanitize("undefined", "address"))) void write_nowhere() { *nowhere = 1; }

void test_guard() {
  struct sigaction mine, after;
  std::memset(&mine, 0, sizeof mine);
  mine.sa_handler = [](int) { handled = handled + 1; };
  sigaction(SIGILL, &mine, nullptr);
  sigset_t blocked, mask;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGILL);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  CHECK(run_guarded([] {}) == 0, "nothing happened, so nothing was caught");
  for (int i = 0; i < 3; ++i) CHECK(run_guarded([] { __asm__ volatile("ud2"); }) == SIGILL, "time %d", i);
  CHECK(run_guarded(write_nowhere) == SIGSEGV, "a write to nowhere");
  CHECK(handled == 0, "our own handler saw what the guard should have caught");
  sigaction(SIGILL, nullptr, &after);
  CHECK(after.sa_handler == mine.sa_handler, "the handler from before must be back");
  pthread_sigmask(SIG_BLOCK, nullptr, &mask);
  CHECK(sigismember(&mask, SIGILL) && !sigismember(&mask, SIGSEGV), "the mask from before must be back");
  pthread_sigmask(SIG_UNBLOCK, &blocked, nullptr);
  signal(SIGILL, SIG_DFL);
}

struct Case {
  std::int64_t m, n, k;
  Element element;
  bool in_index, out_index, bias, residual;
  Activation activation;
  int threads;
};

// y of one call beside float64 of x and weight as bf16 holds them; returns the SQNR in dB against the x and
// weight that were given.
double run(const Case& c, const std::vector<float>& weight, std::vector<float> x) {
  const std::int64_t in_features = c.in_index ? c.k + 9 : c.k, n_out = c.out_index ? c.n + 50 : c.n;
  const std::int64_t x_stride = in_features + 3, y_stride = n_out + 5,
                     element = c.element == Element::fp32 ? 4 : 2;
  const std::vector<float> bias = random_floats(c.n, 3), residual_values = random_floats(c.m * y_stride, 4);
  const std::vector<std::int64_t> in_index = random_kept(c.k, in_features, 5),
                                  out_index = random_kept(c.n, n_out, 6);
  std::vector<char> packed(packed_bytes(Isa::amx, WeightType::bf16, c.n, c.k) + 64);
  pack_weight(Isa::amx, WeightType::bf16, weight.data(), c.k, 1, c.n, c.k, packed.data(), nullptr);
  const auto in_memory = [&](const std::vector<float>& values) {
    std::vector<char> memory(values.size() * element);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint16_t half = bf16_of(values[i]);
      std::memcpy(memory.data() + i * element, element == 4 ? static_cast<const void*>(&values[i]) : &half,
                  element);
    }
    return memory;
  };
  const auto at = [&](const std::vector<char>& memory, std::int64_t i) {
    float wide;
    std::uint16_t half;
    std::memcpy(&wide, memory.data() + i * element, element == 4 ? 4 : 0);
    std::memcpy(&half, memory.data() + i * element, 2);
    return static_cast<double>(element == 4 ? wide : float_of(half));
  };
  const std::vector<char> x_memory = in_memory(x), residual = in_memory(residual_values);
  std::vector<char> y = in_memory(std::vector<float>(c.m * y_stride + 64, kPoison));
  const double poison = at(y, 0);

  LinearCall call;
  call.m = c.m;
  call.in_features = in_features;
  call.n_out = n_out;
  call.weight = {WeightType::bf16, c.n, c.k, packed.data(), nullptr, c.bias ? bias.data() : nullptr};
  call.element = c.element;
  call.x = x_memory.data();
  call.x_stride = x_stride;
  call.in_index = c.in_index ? in_index.data() : nullptr;
  call.out_index = c.out_index ? out_index.data() : nullptr;
  call.residual = c.residual ? residual.data() : nullptr;
  call.residual_stride = call.y_stride = y_stride;
  call.y = y.data();
  call.activation = c.activation;
  call.threads = c.threads;
  CHECK(product_for(kernels(Isa::amx), call.weight, c.element, c.m) != nullptr,
        "these rows must go through tiles");
  compact_linear(Isa::amx, call);
  CHECK(!amx_in_use(), "tiles must be released after a call");

  double signal = 0.0, noise = 0.0;
  const double last = c.element == Element::bf16 ? kEpsBf16 : kEps;
  for (std::int64_t r = 0; r < c.m; ++r) {
    std::vector<double> expected(n_out, 0.0), bound(n_out, 0.0), ideal(n_out, 0.0);
    for (std::int64_t i = 0; i < c.n; ++i) {
      double sum = c.bias ? bias[i] : 0.0, size = std::fabs(sum), exact = sum;
      for (std::int64_t j = 0; j < c.k; ++j) {
        const double given = at(x_memory, r * x_stride + (c.in_index ? in_index[j] : j));
        const double product =
            double(float_of(bf16_of(static_cast<float>(given)))) * float_of(bf16_of(weight[i * c.k + j]));
        sum += product;
        size += std::fabs(product);
        exact += given * weight[i * c.k + j];
      }
      const std::int64_t column = c.out_index ? out_index[i] : i;
      expected[column] = activate_reference(c.activation, sum);
      ideal[column] = activate_reference(c.activation, exact);
      // k + 3 roundings of at most eps times the partial sums, and denormals that tiles take for zero; then
      // the activation (slope under 1.2, own error under 1e-6 of its value).
      bound[column] = 1.2 * ((c.k + 3) * (kEps * size + kDenormal)) + 1e-6 * std::fabs(expected[column]);
      if (c.element == Element::bf16 && c.activation == Activation::gelu) bound[column] += 5.2e-5;  // coarse
    }
    for (std::int64_t i = 0; i < y_stride; ++i) {
      const double got = at(y, r * y_stride + i);
      if (i >= n_out) {
        CHECK(got == poison, "wrote past row %ld", long(r));
        continue;
      }
      const double extra = c.residual ? at(residual, r * y_stride + i) : 0.0, want = expected[i] + extra;
      const double allowed = bound[i] + last * (std::fabs(want) + bound[i]);
      CHECK(std::fabs(got - want) <= allowed, "m=%ld n=%ld k=%ld row %ld column %ld: %g, want %g within %g",
            long(c.m), long(c.n), long(c.k), long(r), long(i), got, want, allowed);
      signal += (ideal[i] + extra) * (ideal[i] + extra);
      noise += (got - ideal[i] - extra) * (got - ideal[i] - extra);
    }
  }
  for (std::int64_t i = 0; i < 64; ++i) CHECK(at(y, c.m * y_stride + i) == poison, "overrun");
  return 10 * std::log10(signal / noise);
}

double run(const Case& c) {
  const std::int64_t x_stride = (c.in_index ? c.k + 9 : c.k) + 3;
  std::vector<float> x = random_floats(c.m * x_stride, 1);
  // Columns that nothing may use: past the end of each row, and those in_index leaves out.
  const std::vector<std::int64_t> in_index = random_kept(c.k, c.k + 9, 5);
  for (std::int64_t r = 0; r < c.m; ++r)
    for (std::int64_t i = 0; i < x_stride; ++i)
      if (i >= x_stride - 3 || (c.in_index && !std::binary_search(in_index.begin(), in_index.end(), i)))
        x[r * x_stride + i] = std::numeric_limits<float>::quiet_NaN();
  return run(c, random_floats(c.n * c.k, 2), x);
}

// Infinite and missing values stay in their rows; denormals do no harm.
void test_special_values() {
  const std::int64_t m = 40, n = 33, k = 70;
  std::vector<float> x = random_floats(m * k, 1);
  const std::vector<float> weight = random_floats(n * k, 2);
  x[3 * k + 5] = std::numeric_limits<float>::infinity();
  x[17 * k + 69] = std::numeric_limits<float>::quiet_NaN();
  x[20 * k + 1] = 3.4e38f;  // the nearest bf16 is infinite
  for (std::int64_t j = 0; j < k; ++j) x[35 * k + j] = 1e-39f;
  std::vector<char> packed(packed_bytes(Isa::amx, WeightType::bf16, n, k));
  pack_weight(Isa::amx, WeightType::bf16, weight.data(), k, 1, n, k, packed.data(), nullptr);
  std::vector<float> y(m * n, kPoison);
  LinearCall call;
  call.m = m;
  call.in_features = k;
  call.n_out = n;
  call.weight = {WeightType::bf16, n, k, packed.data(), nullptr, nullptr};
  call.x = x.data();
  call.x_stride = k;
  call.y = y.data();
  call.y_stride = n;
  compact_linear(Isa::amx, call);
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < n; ++i) {
      const float got = y[r * n + i];
      if (r == 3)
        CHECK(got == std::copysign(std::numeric_limits<float>::infinity(), weight[i * k + 5]),
              "inf became %g", got);
      else if (r == 17)
        CHECK(std::isnan(got), "nan became %g", got);
      else if (r == 20)
        CHECK(std::isinf(got), "x rounds to inf, y is %g", got);
      else if (r == 35)
        CHECK(std::fabs(got) < 1e-36f, "of denormals: %g", got);
      else
        CHECK(std::fabs(got) < 100.0f, "row %ld is %g", long(r), got);
    }
}

}  // namespace

int main() {
  test_guard();
  const AmxVerdict own = probe_amx();
  std::printf("this machine's AMX: %s\n", own.reason.c_str());
  CHECK(own.works == (own.reason == "works"), "%s", own.reason.c_str());
  const std::string tiles = provide_amx();
  if (tiles.empty()) {
    std::printf("not run: this CPU lacks AVX-512 with bf16 conversions\n");
    return 0;
  }
  if (tiles == "emulated") {
    for (Broken what : {Broken::bf16, Broken::int8}) {
      break_emulated_amx(what);
      const AmxVerdict wrong = self_test_amx(false);
      CHECK(!wrong.works && wrong.reason.rfind("self-test failed: a product of tiles gave ", 0) == 0, "%s",
            wrong.reason.c_str());
    }
    break_emulated_amx(Broken::nothing);
  }
  CHECK(amx_verdict().works && amx_verdict().reason == "works", "%s", amx_verdict().reason.c_str());
  CHECK(supported_isas().back() == Isa::amx, "amx must be the best there is");

  int options = 0;
  double worst = 1e9;
  for (std::int64_t m : {5, 16, 17, 33, 129})
    for (std::int64_t n : {1, 33, 64, 257})
      for (std::int64_t k : {1, 32, 100, 372}) {
        options += 11;  // runs through all of them, in every order
        const Case c{m,
                     n,
                     k,
                     options & 32 ? Element::bf16 : Element::fp32,
                     (options & 1) != 0,
                     (options & 2) != 0,
                     (options & 4) != 0,
                     (options & 8) != 0,
                     static_cast<Activation>(options % 5),
                     1 + options % 3};
        const double sqnr = run(c);
        if (m * n * k > 10000 && c.element == Element::fp32) worst = std::min(worst, sqnr);
      }
  run({40, 70, 0, Element::fp32, false, false, true, true, Activation::gelu, 1});
  // More rows than one block holds: 2 MB of L2 keep 160 of 3,600 inputs.
  run({200, 33, 3600, Element::fp32, false, true, true, true, Activation::gelu, 2});
  // Rounding x and weight to bf16 leaves relative errors of 2^-8 / sqrt(3) at most in each, 0.7 of that on
  // average over mantissas: 53 dB. The sums add nothing to be seen.
  std::printf("%s tiles: lowest SQNR against x and weight before rounding %.1f dB\n", tiles.c_str(), worst);
  CHECK(worst > 50.0, "%.1f dB", worst);
  test_special_values();
  return 0;
}
