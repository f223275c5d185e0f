// compact_mlp against float64, every instruction set: weight types, elements, options, threads, empty layers.
#include <algorithm>

#include "tests/amx_emulator.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr float kPoison = 1e30f;
constexpr double kEps = 0x1p-24, kEpsBf16 = 0x1p-8;  // half a unit in the last place, relative

struct Case {
  std::int64_t m, in, hidden, out;
  WeightType type;
  Element element;
  bool gate, in_index, out_index, bias, residual;
  Activation activation;
  int threads;
};

// A packed weight and what the kernels take it for.
struct Layer {
  std::int64_t n, k;
  std::vector<float> bias, scale, value;
  std::vector<char> memory;
  char* data;

  Layer(Isa isa, WeightType type, std::int64_t n, std::int64_t k, unsigned seed)
      : n(n), k(k), bias(random_floats(n, seed + 1)), scale(n), value(n * k) {
    std::vector<float> weight = random_floats(n * k, seed);
    for (float& one : weight) one /= std::sqrt(static_cast<float>(k));
    memory.resize(packed_bytes(isa, type, n, k) + 64);
    data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    pack_weight(isa, type, weight.data(), k, 1, n, k, data, scale.data());
    unpack_weight(isa, type, data, scale.data(), n, k, value.data());
  }

  Packed packed(WeightType type, bool with_bias) const {
    return {type,
            n,
            k,
            data,
            type == WeightType::int8 ? scale.data() : nullptr,
            with_bias ? bias.data() : nullptr,
            type == WeightType::bf16 ? Activations::automatic : Activations::floating};  // as in test_linear
  }
};

// Rows of x, residual and y in the element type, seen as floats.
struct Matrix {
  Element element;
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;

  // Both element types hold the same values, and a kernel that rounds x to bf16 rounds nothing.
  Matrix(Element element, std::vector<float> values) : element(element), wide(std::move(values)) {
    for (float& one : wide) {
      narrow.push_back(bf16_of(one));
      one = float_of(narrow.back());
    }
  }
  void* data() {
    return element == Element::fp32 ? static_cast<void*>(wide.data()) : static_cast<void*>(narrow.data());
  }
  double operator[](std::int64_t i) const { return element == Element::fp32 ? wide[i] : float_of(narrow[i]); }
};

struct Sum {
  double value = 0.0, error = 0.0;
};

// One layer in float64 with a bound for what fp32 sums may be off, given inputs with bounds.
std::vector<Sum> linear(const Layer& layer, bool with_bias, Activation activation, const std::vector<Sum>& x,
                        bool is_coarse = false) {
  std::vector<Sum> y(layer.n);
  for (std::int64_t i = 0; i < layer.n; ++i) {
    double sum = with_bias ? layer.bias[i] : 0.0, size = std::fabs(sum), error = 0.0;
    for (std::int64_t j = 0; j < layer.k; ++j) {
      const double weight = layer.value[i * layer.k + j];
      sum += weight * x[j].value;
      size += std::fabs(weight * x[j].value);
      error += std::fabs(weight) * x[j].error;
    }
    // k + 3 roundings (products, scale, bias), then the activation: slope under 1.2, own error under 1e-6.
    y[i].value = activate_reference(activation, sum);
    y[i].error =
        1.2 * ((static_cast<double>(layer.k) + 3) * kEps * size + error) + 1e-6 * std::fabs(y[i].value);
    if (is_coarse && activation == Activation::gelu) y[i].error += 5.2e-5;
  }
  return y;
}

void run(Isa isa, const Case& c) {
  const std::int64_t in_features = c.in_index ? c.in + 9 : c.in, n_out = c.out_index ? c.out + 50 : c.out;
  const std::int64_t x_stride = in_features + 3, y_stride = n_out + 5;
  const Layer up(isa, c.type, c.hidden, c.in, 1), gate(isa, c.type, c.hidden, c.in, 11),
      down(isa, c.type, c.out, c.hidden, 21);
  Matrix x(c.element, random_floats(c.m * x_stride, 5)),
      residual(c.element, random_floats(c.m * y_stride, 6)),
      y(c.element, std::vector<float>(c.m * y_stride + 64, kPoison));
  const double poison = y[0];
  const std::vector<std::int64_t> in_index = random_kept(c.in, in_features, 7),
                                  out_index = random_kept(c.out, n_out, 8);
  MlpCall call;
  call.m = c.m;
  call.in_features = in_features;
  call.n_out = n_out;
  call.up = up.packed(c.type, c.bias);
  call.down = down.packed(c.type, c.bias);
  if (c.gate) call.gate = gate.packed(c.type, c.bias);
  call.element = c.element;
  call.x = x.data();
  call.x_stride = x_stride;
  call.in_index = c.in_index ? in_index.data() : nullptr;
  call.out_index = c.out_index ? out_index.data() : nullptr;
  call.residual = c.residual ? residual.data() : nullptr;
  call.residual_stride = call.y_stride = y_stride;
  call.y = y.data();
  call.activation = c.activation;
  call.threads = c.threads;
  compact_mlp(isa, call);

  // The rows between the layers: fp32, or bf16 where x is, or where they are multiplied so.
  const bool pairs = isa == Isa::amx || (isa == Isa::avx512_bf16 && bf16_verdict().pays);
  const bool narrow = c.element == Element::bf16 || (pairs && c.type == WeightType::bf16);
  const bool is_coarse = pairs && c.type == WeightType::bf16;  // their gelu, where y is bf16
  const double between = narrow ? kEpsBf16 : 0.0, last = c.element == Element::bf16 ? kEpsBf16 : kEps;
  for (std::int64_t r = 0; r < c.m; ++r) {
    std::vector<Sum> inputs(c.in);
    for (std::int64_t j = 0; j < c.in; ++j)
      inputs[j].value = x[r * x_stride + (c.in_index ? in_index[j] : j)];
    std::vector<Sum> hidden = linear(up, c.bias, c.gate ? Activation::none : c.activation, inputs, is_coarse);
    if (c.gate) {
      const std::vector<Sum> by = linear(gate, c.bias, c.activation, inputs, is_coarse);
      for (std::int64_t j = 0; j < c.hidden; ++j) {
        const double a = hidden[j].value, b = by[j].value;
        const double a_error = hidden[j].error + between * std::fabs(a),
                     b_error = by[j].error + between * std::fabs(b);
        hidden[j].value = a * b;
        hidden[j].error =
            std::fabs(a) * b_error + std::fabs(b) * a_error + a_error * b_error + kEps * std::fabs(a * b);
      }
    }
    for (Sum& one : hidden) one.error += between * (std::fabs(one.value) + one.error);
    const std::vector<Sum> outputs = linear(down, c.bias, Activation::none, hidden);
    std::vector<Sum> wide(n_out);
    for (std::int64_t i = 0; i < c.out; ++i) wide[c.out_index ? out_index[i] : i] = outputs[i];
    for (std::int64_t i = 0; i < y_stride; ++i) {
      const double got = y[r * y_stride + i];
      if (i >= n_out) {
        CHECK(got == poison, "%s: wrote past row %ld", name(isa), long(r));
        continue;
      }
      const double want = wide[i].value + (c.residual ? residual[r * y_stride + i] : 0.0);
      const double allowed = wide[i].error + last * (std::fabs(want) + wide[i].error);
      CHECK(std::fabs(got - want) <= allowed,
            "%s %s m=%ld %ld->%ld->%ld gate %d row %ld column %ld: %g, want %g within %g", name(isa),
            name(c.type), long(c.m), long(c.in), long(c.hidden), long(c.out), c.gate, long(r), long(i), got,
            want, allowed);
    }
  }
  for (std::int64_t i = 0; i < 64; ++i) CHECK(y[c.m * y_stride + i] == poison, "overrun");
}

std::string refusal(void (*spoil)(MlpCall&)) {
  std::vector<float> values(4096, 0.0f);
  MlpCall call;
  call.m = 1;
  call.in_features = call.up.k = call.down.n = call.n_out = call.x_stride = call.y_stride = 8;
  call.up.n = call.down.k = 16;
  call.x = call.up.data = call.down.data = values.data();
  call.y = values.data();
  spoil(call);
  return message_of([&] { compact_mlp(Isa::generic, call); });
}

}  // namespace

int main() {
  std::printf("amx: %s\n", provide_amx().c_str());
  for (Isa isa : supported_isas())
    for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8}) {
      for (Element element : {Element::fp32, Element::bf16}) {
        int options = 0;
        for (std::int64_t m : {0, 1, 5, 16, 43, 129})
          for (std::int64_t hidden : {0, 1, 70, 257})
            for (std::int64_t out : {0, 3, 96}) {
              options += 7;  // runs through all 32, in every order
              for (int more = 0; more < 2; ++more, options += 13)
                run(isa, {m, 33 + 16 * more, hidden, out, type, element, (options & 1) != 0,
                          (options & 2) != 0, (options & 4) != 0, (options & 8) != 0, (options & 16) != 0,
                          static_cast<Activation>(options % 5), 1 + options % 3});
            }
      }
      // More rows than one block holds: 2 MB of L2 keep 87 rows of 3000.
      run(isa, {200, 40, 3000, 20, type, Element::fp32, false, true, true, true, true, Activation::gelu, 2});
    }
  // So wide that both layers go through a block of rows in parts (loops/prepared_mlp.cpp).
  if (supported_isas().back() == Isa::amx)
    run(Isa::amx, {150, 40, 9000, 20, WeightType::bf16, Element::fp32, true, true, true, true, true,
                   Activation::silu, 1});
  std::string message = refusal([](MlpCall& call) { call.down.k = 15; });
  CHECK(message == "compact_mlp: down must read what up makes (up is 16 x 8, down 8 x 15)", "%s",
        message.c_str());
  message = refusal([](MlpCall& call) {
    call.gate = call.up;
    call.gate.n = 9;
  });
  CHECK(message == "compact_mlp: gate must have the shape of up (up is 16 x 8, gate 9 x 8)", "%s",
        message.c_str());
  message = refusal([](MlpCall& call) { call.in_features = 9; });
  CHECK(message == "compact_mlp: up reads 8 inputs, x has 9", "%s", message.c_str());
  message = refusal([](MlpCall& call) { call.n_out = 9; });
  CHECK(message == "compact_mlp: down makes 8 outputs, n_out is 9", "%s", message.c_str());
  message = refusal([](MlpCall& call) { call.gate.type = call.down.type = WeightType::int8; });
  CHECK(message == "compact_mlp: an int8 weight needs its scale (got none)", "%s", message.c_str());
  static const std::int64_t index[] = {0, 1, 2, 3, 4, 5, 6, 8};
  message = refusal([](MlpCall& call) { call.out_index = index; });
  CHECK(message == "compact_mlp: out_index must be sorted and < 8 (got 8 at position 7)", "%s",
        message.c_str());
  message = refusal([](MlpCall& call) { call.threads = 0; });
  CHECK(message == "compact_mlp: threads must be at least 1 (got 0)", "%s", message.c_str());
  return 0;
}
