// compact_linear against float64: every instruction set, weight type and element; odd shapes, strides,
// indices, options, threads.
#include <algorithm>

#include "tests/amx_emulator.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;

struct Case {
  std::int64_t m, n, k;
  bool in_index, out_index, bias, residual;
  Activation activation;
  int threads;
  WeightType type = WeightType::fp32;
  Element element = Element::fp32;
};

// Values as the caller holds them: fp32, or bf16 and the floats they stand for.
struct Values {
  Element element;
  std::vector<float> floats;
  std::vector<std::uint16_t> halves;

  Values(Element element, std::vector<float> from) : element(element), floats(std::move(from)) {
    if (element == Element::fp32) return;
    for (float& value : floats) {
      halves.push_back(bf16_of(value));
      value = float_of(halves.back());
    }
  }
  const void* data() const {
    return element == Element::fp32 ? static_cast<const void*>(floats.data()) : halves.data();
  }
  void* data() { return const_cast<void*>(static_cast<const Values*>(this)->data()); }
  float at(std::size_t i) const { return element == Element::fp32 ? floats[i] : float_of(halves[i]); }
};

// Products of bf16 take x in bf16 only.
bool rounds_x(Isa isa, WeightType type) {
  return type == WeightType::bf16 && (isa == Isa::amx || (isa == Isa::avx512_bf16 && bf16_verdict().pays));
}

// Whether its fp32 arithmetic is that of another set, which has been tested.
bool is_a_copy(Isa isa) {
  return isa == Isa::avx2_vnni || isa == Isa::avx512_vnni || isa == Isa::avx512_bf16 || isa == Isa::amx;
}

void run(Isa isa, const Case& c) {
  const std::int64_t in_features = c.in_index ? c.k + 9 : c.k, n_out = c.out_index ? c.n + 50 : c.n;
  const std::int64_t x_stride = in_features + 3, y_stride = n_out + 5;
  std::vector<float> x_floats = random_floats(c.m * x_stride, 1);
  const std::vector<float> bias = random_floats(c.n, 3), plain = random_floats(c.n * c.k, 2);
  const std::vector<std::int64_t> in_index = random_kept(c.k, in_features, 5);
  const std::vector<std::int64_t> out_index = random_kept(c.n, n_out, 6);
  // Columns of x that nothing may read: past the end of each row, and those in_index leaves out.
  for (std::int64_t r = 0; r < c.m; ++r)
    for (std::int64_t i = 0; i < x_stride; ++i)
      if (i >= in_features || (c.in_index && !std::binary_search(in_index.begin(), in_index.end(), i)))
        x_floats[r * x_stride + i] = std::numeric_limits<float>::quiet_NaN();
  if (rounds_x(isa, c.type))
    for (float& value : x_floats) value = float_of(bf16_of(value));
  const Values x(c.element, x_floats), residual(c.element, random_floats(c.m * y_stride, 4));
  Values y(c.element, std::vector<float>(c.m * y_stride + 64, kPoison));
  const float poison = y.at(0);
  std::vector<char> packed(packed_bytes(isa, c.type, c.n, c.k), 0x5a);
  std::vector<float> scale(c.n), weight(c.n * c.k);  // weight: what is multiplied; test_pack checks it
  pack_weight(isa, c.type, plain.data(), c.k, 1, c.n, c.k, packed.data(), scale.data());
  unpack_weight(isa, c.type, packed.data(), scale.data(), c.n, c.k, weight.data());

  LinearCall call;
  call.m = c.m;
  call.in_features = in_features;
  call.weight.type = c.type;
  call.weight.k = c.k;
  call.weight.n = c.n;
  call.weight.data = packed.data();
  call.weight.scale = c.type == WeightType::int8 ? scale.data() : nullptr;
  call.weight.bias = c.bias ? bias.data() : nullptr;
  // Whatever multiplies bf16; test_int8 has the other ways of int8.
  call.weight.activations = c.type == WeightType::bf16 ? Activations::automatic : Activations::floating;
  call.n_out = n_out;
  call.element = c.element;
  call.x = x.data();
  call.x_stride = x_stride;
  call.in_index = c.in_index ? in_index.data() : nullptr;
  call.out_index = c.out_index ? out_index.data() : nullptr;
  call.residual = c.residual ? residual.data() : nullptr;
  call.residual_stride = y_stride;
  call.y = y.data();
  call.y_stride = y_stride;
  call.activation = c.activation;
  call.threads = c.threads;
  compact_linear(isa, call);

  const double eps = 0x1p-24, rounding = c.element == Element::fp32 ? eps : 0x1p-8;  // of y: half a step
  for (std::int64_t r = 0; r < c.m; ++r) {
    std::vector<double> expected(n_out, 0.0), bound(n_out, 0.0);
    for (std::int64_t i = 0; i < c.n; ++i) {
      double sum = c.bias ? bias[i] : 0.0, size = std::fabs(sum);
      for (std::int64_t j = 0; j < c.k; ++j) {
        const double product =
            double(x.at(r * x_stride + (c.in_index ? in_index[j] : j))) * weight[i * c.k + j];
        sum += product;
        size += std::fabs(product);
      }
      const std::int64_t column = c.out_index ? out_index[i] : i;
      expected[column] = activate_reference(c.activation, sum);
      // k + 1 roundings of at most eps times the partial sums, one more for a scale and one for unpacking
      // with it; then the activation (slope under 1.2, own error under 1e-6 of its value).
      const int scaled = c.type == WeightType::int8 ? 2 : 0;
      bound[column] = 1.2 * (c.k + 1 + scaled) * eps * size + 1e-6 * std::fabs(expected[column]);
      // Products of bf16 whose y is bf16, too, take a coarser gelu.
      if (rounds_x(isa, c.type) && c.element == Element::bf16 && c.activation == Activation::gelu)
        bound[column] += 5.2e-5;
    }
    for (std::int64_t i = 0; i < y_stride; ++i) {
      const float got = y.at(r * y_stride + i);
      if (i >= n_out) {
        CHECK(got == poison, "%s: wrote past row %ld", name(isa), long(r));
        continue;
      }
      const double extra = c.residual ? residual.at(r * y_stride + i) : 0.0;
      const double want = expected[i] + extra, allowed = bound[i] + rounding * (std::fabs(want) + bound[i]);
      CHECK(std::fabs(got - want) <= allowed,
            "%s %s weights, bf16 x %d: m=%ld n=%ld k=%ld row %ld column %ld: %g, want %g within %g",
            name(isa), name(c.type), int(c.element), long(c.m), long(c.n), long(c.k), long(r), long(i), got,
            want, allowed);
    }
  }
  for (std::int64_t i = c.m * y_stride; i < c.m * y_stride + 64; ++i) CHECK(y.at(i) == poison, "overrun");
}

// Signal over noise of y, in decibels, against float64 on the weight before it was rounded.
double sqnr(Isa isa, WeightType type) {
  const std::int64_t m = 33, n = 96, k = 512;
  const std::vector<float> x = random_floats(m * k, 1), weight = random_floats(n * k, 2);
  std::vector<char> packed(packed_bytes(isa, type, n, k));
  std::vector<float> scale(n), y(m * n);
  pack_weight(isa, type, weight.data(), k, 1, n, k, packed.data(), scale.data());
  LinearCall call;
  call.m = m;
  call.in_features = call.weight.k = call.x_stride = k;
  call.n_out = call.weight.n = call.y_stride = n;
  call.weight.type = type;
  call.weight.data = packed.data();
  call.weight.scale = scale.data();
  call.weight.activations = type == WeightType::bf16 ? Activations::automatic : Activations::floating;
  call.x = x.data();
  call.y = y.data();
  compact_linear(isa, call);
  double signal = 0.0, noise = 0.0;
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < k; ++j) sum += double(x[r * k + j]) * weight[i * k + j];
      signal += sum * sum;
      noise += (y[r * n + i] - sum) * (y[r * n + i] - sum);
    }
  return 10.0 * std::log10(signal / noise);
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

void check_refusals() {
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
  LinearCall call;
  call.m = call.in_features = call.n_out = call.weight.k = call.weight.n = call.x_stride = call.y_stride = 1;
  call.weight.type = WeightType::int8;
  const std::string message = message_of([&] { compact_linear(Isa::generic, call); });
  CHECK(message == "compact_linear: an int8 weight needs its scale (got none)", "%s", message.c_str());
}

}  // namespace

int main() {
  const WeightType types[] = {WeightType::fp32, WeightType::bf16, WeightType::int8};
  std::printf("amx: %s\n", provide_amx().c_str());
  for (Isa isa : supported_isas()) {
    for (std::int64_t m :
         is_a_copy(isa) ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{0, 1, 5, 16, 129})
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
    // More of x than stays in L2: panels take turns, chunk of k by chunk.
    for (WeightType type : {WeightType::fp32, WeightType::int8})
      run(isa, {135, 70, 4101, false, true, true, true, Activation::relu, 1, type});
    // Every weight type with every element: one tile and several; k of one chunk and of several, even and
    // odd.
    for (WeightType type : types) {
      if (is_a_copy(isa) && !rounds_x(isa, type)) continue;
      for (Element element : {Element::fp32, Element::bf16})
        for (std::int64_t m : {1, 2, 33})
          for (std::int64_t n : {1, 33, 70})
            for (std::int64_t k : {0, 1, 31, 373, 801})
              for (int options : {0, 7, 15})
                run(isa,
                    {m, n, k, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, (options & 8) != 0,
                     static_cast<Activation>((m + k + options) % 5), 1 + options % 3, type, element});
    }
    // bf16: the error is uniform in a step of 2^(exponent - 7); over a normal distribution -55.6 dB. int8:
    // the step is the largest of 512 normal weights (3.2 in the quadratic mean) / 127: -42.7 dB. 3168 outputs
    // scatter by 0.2 dB.
    const double bf16 = sqnr(isa, WeightType::bf16), int8 = sqnr(isa, WeightType::int8);
    std::printf("%-11s SQNR: bf16 %.1f dB, int8 %.1f dB\n", name(isa), bf16, int8);
    // Products of bf16 round x as well: twice the error, 3 dB.
    const double rounded = rounds_x(isa, WeightType::bf16) ? 3.0 : 0.0;
    CHECK(bf16 > 54.8 - rounded && bf16 < 56.4 - rounded, "%s: bf16 %g dB", name(isa), bf16);
    CHECK(int8 > 41.9 && int8 < 43.5, "%s: int8 %g dB", name(isa), int8);
  }
  check_refusals();
  return 0;
}
