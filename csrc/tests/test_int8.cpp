// int8 x int8, every instruction set: sums bit by bit against a plain loop; then whole calls against float64
// on the rounded numbers; rows that cannot be rounded; what is refused.
#include <algorithm>

#include "cpu/table.h"
#include "kernels/product.h"
#include "loops/products.h"
#include "ops/linear.h"
#include "ops/mlp.h"
#include "tests/amx_emulator.h"
#include "tests/check.h"

using namespace prunekern;

#ifdef PRUNEKERN_EVEX_VNNI
namespace prunekern {
extern const Product kEvexVnniInt8;
}
#endif

namespace {

constexpr float kPoison = 1e30f;
constexpr double kEps = 0x1p-24;

// A row as x is said to be rounded, written apart from the code it checks.
struct Rounded {
  std::vector<int> q;
  float scale = 0.0f;

  explicit Rounded(const std::vector<float>& x) : q(x.size(), 0) {
    float largest = 0.0f;
    bool finite = true;
    for (float value : x) {
      finite = finite && std::isfinite(value);
      largest = std::fmax(largest, std::fabs(value));
    }
    if (!finite) {
      scale = std::numeric_limits<float>::quiet_NaN();
    } else if (largest > 1e-36f) {
      scale = largest / 127.0f;
      const float inverse = 127.0f / largest;
      for (std::size_t i = 0; i < x.size(); ++i) q[i] = static_cast<int>(std::nearbyintf(x[i] * inverse));
    }
  }
};

struct Weight {
  std::int64_t n, k;
  std::vector<float> plain, bias, scale;
  std::vector<char> memory;
  Packed packed;

  Weight(Isa isa, std::int64_t n, std::int64_t k, unsigned seed, bool extreme = false)
      : n(n), k(k), plain(random_floats(n * k, seed)), bias(random_floats(n, seed + 1)), scale(n) {
    if (extreme)  // the largest sums there are: 127 times 127, of both signs
      for (std::int64_t i = 0; i < n * k; ++i) plain[i] = i / k % 2 == 0 ? 1.0f : -1.0f;
    memory.resize(packed_bytes(isa, WeightType::int8, n, k) + 64);
    char* data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    pack_weight(isa, WeightType::int8, plain.data(), k, 1, n, k, data, scale.data());
    packed = {WeightType::int8, n, k, data, scale.data(), bias.data(), Activations::int8};
  }
  int q(std::int64_t channel, std::int64_t j) const {
    return scale[channel] > 0.0f ? static_cast<int>(std::nearbyintf(plain[channel * k + j] / scale[channel]))
                                 : 0;
  }
};

// The product's own sums, before anything is made of them.
void check_sums(const Product& product, Isa isa, std::int64_t k, bool extreme) {
  const std::int64_t width = panel_width(isa), most = group_rows(product);
  const Weight weight(isa, width, k, 3, extreme);
  std::vector<float> x = random_floats(most * k, 5);
  if (extreme) std::fill(x.begin(), x.end(), 2.0f);
  std::vector<std::int64_t> want(most * width, 0);
  for (std::int64_t r = 0; r < most; ++r) {
    const Rounded row(std::vector<float>(x.begin() + r * k, x.begin() + (r + 1) * k));
    for (std::int64_t i = 0; i < width; ++i)
      for (std::int64_t j = 0; j < k; ++j) want[r * width + i] += row.q[j] * weight.q(i, j);
  }
  for (std::int64_t rows = 1; rows <= most; ++rows) {
    std::vector<char> tiles(prepared_bytes(product, rows, k) + 64, 0x5a);
    std::vector<float> acc(most * width + kMaxWidth, kPoison);
    PrepareArgs prepare{};
    prepare.x = x.data();
    prepare.x_stride = prepare.k = k;
    prepare.rows = rows;
    prepare.to = tiles.data();
    if (product.begin != nullptr) product.begin();
    product.prepare[0](prepare);
    ProductArgs args{};
    args.x = tiles.data();
    args.row_tiles = ceil_div(rows, product.tile_rows);
    args.row_tile_bytes = row_tile_bytes(product, k);
    args.panel = static_cast<const char*>(weight.packed.data);
    args.readable = packed_bytes(isa, WeightType::int8, width, k);
    args.k_steps = steps(product, k);
    args.acc = acc.data();
    args.rows = rows;
    product.multiply(args);
    if (product.end != nullptr) product.end();
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < width; ++i) {
        std::int32_t got;
        std::memcpy(&got, &acc[r * width + i], 4);
        CHECK(got == want[r * width + i], "%s k=%ld rows=%ld row %ld channel %ld: %d, want %ld", name(isa),
              long(k), long(rows), long(r), long(i), got, long(want[r * width + i]));
      }
    CHECK(tiles[prepared_bytes(product, rows, k)] == 0x5a, "wrote past the row tiles");
  }
}

void check_all_sums(const Product& product, Isa isa) {
  for (std::int64_t k : {1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 372, 768}) check_sums(product, isa, k, false);
  for (std::int64_t k : {1, 16, 1021}) check_sums(product, isa, k, true);
  check_sums(product, isa, kMostInt8Inputs, true);
}

struct Case {
  std::int64_t m, n, k;
  bool in_index, out_index, bias, residual, narrow;
  Activation activation;
  int threads;
};

// A whole call against float64 on the rounded numbers.
void run(const Kernels& table, Isa isa, const Case& c) {
  const std::int64_t in = c.in_index ? c.k + 9 : c.k, out = c.out_index ? c.n + 40 : c.n, y_stride = out + 5;
  const std::vector<std::int64_t> in_index = random_kept(c.k, in, 5), out_index = random_kept(c.n, out, 6);
  std::vector<float> x = random_floats(c.m * (in + 3), 1), residual = random_floats(c.m * y_stride, 4);
  std::vector<std::uint16_t> x_narrow, residual_narrow;
  for (float& value : x) {
    x_narrow.push_back(bf16_of(value));
    if (c.narrow) value = float_of(x_narrow.back());
  }
  for (float& value : residual) {
    residual_narrow.push_back(bf16_of(value));
    if (c.narrow) value = float_of(residual_narrow.back());
  }
  Weight weight(isa, c.n, c.k, 2);
  if (!c.bias) weight.packed.bias = nullptr;
  std::vector<float> y(c.m * y_stride + 1, kPoison);
  std::vector<std::uint16_t> y_narrow(c.m * y_stride + 1, bf16_of(kPoison));
  LinearCall call;
  call.m = c.m;
  call.in_features = in;
  call.x_stride = in + 3;
  call.n_out = out;
  call.y_stride = call.residual_stride = y_stride;
  call.weight = weight.packed;
  call.element = c.narrow ? Element::bf16 : Element::fp32;
  call.x = c.narrow ? static_cast<const void*>(x_narrow.data()) : x.data();
  call.residual = !c.residual ? nullptr
                  : c.narrow  ? static_cast<const void*>(residual_narrow.data())
                              : residual.data();
  call.y = c.narrow ? static_cast<void*>(y_narrow.data()) : y.data();
  call.in_index = c.in_index ? in_index.data() : nullptr;
  call.out_index = c.out_index ? out_index.data() : nullptr;
  call.activation = c.activation;
  call.threads = c.threads;
  compact_linear(table, call);
  if (c.narrow)
    for (std::size_t i = 0; i < y.size(); ++i) y[i] = float_of(y_narrow[i]);
  for (std::int64_t r = 0; r < c.m; ++r) {
    std::vector<float> row;
    for (std::int64_t j = 0; j < c.k; ++j) row.push_back(x[r * (in + 3) + (c.in_index ? in_index[j] : j)]);
    const Rounded rounded(row);
    std::vector<double> want(out, 0.0), bound(out, 0.0);
    for (std::int64_t i = 0; i < c.n; ++i) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < c.k; ++j) sum += rounded.q[j] * weight.q(i, j);
      sum *= double(rounded.scale) * weight.scale[i];
      const double bias = c.bias ? weight.bias[i] : 0.0;
      const std::int64_t column = c.out_index ? out_index[i] : i;
      want[column] = activate_reference(c.activation, sum + bias);
      // The sum to fp32, two scales and the bias: 4 roundings; the activation as in test_linear.
      bound[column] = 1.2 * 4 * kEps * (std::fabs(sum) + std::fabs(bias)) + 1e-6 * std::fabs(want[column]);
      if (c.activation == Activation::gelu) bound[column] += 5.2e-5;  // the coarse one
    }
    for (std::int64_t i = 0; i < y_stride; ++i) {
      const double got = y[r * y_stride + i];
      if (i >= out) {
        CHECK(got == (c.narrow ? float_of(bf16_of(kPoison)) : kPoison), "wrote past row %ld", long(r));
        continue;
      }
      const double all = want[i] + (c.residual ? residual[r * y_stride + i] : 0.0);
      const double allowed = bound[i] + (c.narrow ? 0x1p-8 : kEps) * (std::fabs(all) + bound[i]);
      CHECK(std::fabs(got - all) <= allowed,
            "%s m=%ld n=%ld k=%ld row %ld column %ld: %.9g, want %.9g within %g", name(isa), long(c.m),
            long(c.n), long(c.k), long(r), long(i), got, all, allowed);
    }
  }
}

// The rows between the layers are rounded like any others: the same bits as layer by layer.
void check_mlp(const Kernels& table, Isa isa, std::int64_t m, bool gated) {
  const Weight up(isa, 70, 37, 1), gate(isa, 70, 37, 2), down(isa, 33, 70, 3);
  const std::vector<float> x = random_floats(m * 37, 4);
  std::vector<float> y(m * 33), hidden(m * 70), by(m * 70), want(m * 33);
  MlpCall call;
  call.m = m;
  call.in_features = call.x_stride = 37;
  call.n_out = call.y_stride = 33;
  call.up = up.packed;
  call.down = down.packed;
  if (gated) call.gate = gate.packed;
  call.x = x.data();
  call.y = y.data();
  call.activation = Activation::gelu;
  compact_mlp(table, call);
  LinearCall first;
  first.m = m;
  first.in_features = first.x_stride = 37;
  first.n_out = first.y_stride = 70;
  first.x = x.data();
  first.weight = up.packed;
  first.y = hidden.data();
  first.activation = gated ? Activation::none : Activation::gelu;
  compact_linear(table, first);
  if (gated) {
    first.weight = gate.packed;
    first.y = by.data();
    first.activation = Activation::gelu;
    compact_linear(table, first);
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] *= by[i];
  }
  LinearCall last;
  last.m = m;
  last.in_features = last.x_stride = 70;
  last.n_out = last.y_stride = 33;
  last.x = hidden.data();
  last.weight = down.packed;
  last.y = want.data();
  compact_linear(table, last);
  CHECK(std::memcmp(y.data(), want.data(), y.size() * 4) == 0, "%s m=%ld: an mlp differs from its layers",
        name(isa), long(m));
}

// NaN and infinities give NaN throughout the row, and nowhere else; zeros and what is next to them give the
// bias.
void check_odd_rows(const Kernels& table, Isa isa) {
  const std::int64_t k = 37, n = 40;
  const Weight weight(isa, n, k, 7);
  const float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                       std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(),
                       0.0f,
                       1e-42f,
                       3e38f};
  for (std::int64_t at : {std::int64_t(0), k / 2, k - 1}) {
    std::vector<float> x(6 * k, 0.0f), y(6 * n);
    for (int r = 0; r < 6; ++r) x[r * k + at] = odd[r];
    LinearCall call;
    call.m = 6;
    call.in_features = call.x_stride = k;
    call.n_out = call.y_stride = n;
    call.weight = weight.packed;
    call.x = x.data();
    call.y = y.data();
    compact_linear(table, call);
    for (int r = 0; r < 6; ++r)
      for (std::int64_t i = 0; i < n; ++i) {
        const float got = y[r * n + i];
        if (r < 3)
          CHECK(std::isnan(got), "%s row %d: %g", name(isa), r, got);
        else if (r < 5)
          CHECK(got == weight.bias[i], "%s row %d: %g", name(isa), r, got);
        else
          CHECK(std::isfinite(got) || std::fabs(weight.plain[i * k + at]) > 1.0f, "%s row %d: %g", name(isa),
                r, got);
      }
  }
}

void check_table(const Kernels& table, Isa isa) {
  int options = 0;
  for (std::int64_t m : {1, 2, 5, 13, 14, 15, 29, 60})
    for (std::int64_t n : {1, 33, 70})
      for (std::int64_t k : {1, 31, 373}) {
        options += 11;  // runs through all 32, in every order
        run(table, isa,
            {m, n, k, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0, (options & 8) != 0,
             (options & 16) != 0, static_cast<Activation>(options % 5), 1 + options % 3});
      }
  for (std::int64_t m : {1, 5, 43, 400})
    for (bool gated : {false, true}) check_mlp(table, isa, m, gated);
  check_odd_rows(table, isa);
}

void check_choice(const Kernels& table) {
  Packed weight;
  weight.type = WeightType::int8;
  const auto chosen = [&](std::int64_t m) {
    const Product* product = product_for(table, weight, Element::fp32, m);
    return product == nullptr ? Arithmetic::fp32 : product->arithmetic;
  };
  weight.activations = Activations::int8;
  for (std::int64_t m : {1, 6, 7, 1000})
    CHECK(chosen(m) == Arithmetic::int8, "asked for, at any number of rows");
  weight.activations = Activations::floating;
  for (std::int64_t m : {1, 6, 7, 1000}) CHECK(chosen(m) == Arithmetic::fp32, "not asked for");
  weight.activations = Activations::automatic;
  weight.k = kMostInt8Inputs + 1;
  CHECK(chosen(1) == Arithmetic::fp32, "sums that do not fit int32");
}

void check_refusals() {
  std::vector<float> values(64, 0.0f);
  LinearCall call;
  call.m = call.in_features = call.n_out = call.weight.k = call.weight.n = call.x_stride = call.y_stride = 1;
  call.x = call.weight.data = values.data();
  call.y = values.data();
  call.weight.activations = Activations::int8;
  std::string message = message_of([&] { compact_linear(Isa::generic, call); });
  CHECK(message == "compact_linear: activations int8 go with an int8 weight (got fp32)", "%s",
        message.c_str());
  call.weight.type = WeightType::int8;
  call.weight.scale = values.data();
  call.weight.k = call.in_features = call.x_stride = kMostInt8Inputs + 1;
  message = message_of([&] { compact_linear(Isa::generic, call); });
  CHECK(message == "compact_linear: activations int8 go with at most 133143 inputs (got 133144)", "%s",
        message.c_str());
  message = message_of([] { parse_activations("int4"); });
  CHECK(message == "activations must be auto, float or int8 (got int4)", "%s", message.c_str());
}

}  // namespace

int main() {
  provide_amx();
  for (Isa isa : supported_isas()) {
    const Kernels& table = kernels(isa);
    for (const Product* product : table.products)
      if (product != nullptr && product->arithmetic == Arithmetic::int8) check_all_sums(*product, isa);
    check_table(table, isa);
    check_choice(table);
  }
#ifdef PRUNEKERN_EVEX_VNNI
  const std::vector<Isa> isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), Isa::avx512_vnni) != isas.end()) {
    Kernels table = kernels(Isa::avx2);
    table.products[0] = &kEvexVnniInt8;
    check_all_sums(kEvexVnniInt8, Isa::avx2);
    check_table(table, Isa::avx2);
    std::printf("avx2_vnni: by instructions of AVX-512\n");
  } else {
    std::printf("avx2_vnni: not run by instructions of AVX-512, which this CPU lacks\n");
  }
#endif
  check_refusals();
  return 0;
}
