// A row that no table of ours has yet, in plain C++: int8 weights times rows that are quantised to int8 as
// they come, sums in int32, an epilogue that scales. No loop and no op had to learn of it.
#include <algorithm>

#include "cpu/table.h"
#include "kernels/product.h"
#include "loops/products.h"
#include "ops/linear.h"
#include "ops/mlp.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr std::int64_t kTileRows = 3, kStep = 4, kWidth = 8;  // panels of the generic table
constexpr float kPoison = 1e30f;
thread_local int begun = 0;

// Row tile: [k_steps][rows][4] int8, then a scale for each row.
template <class T>
void prepare(const PrepareArgs& args) {
  CHECK(begun == 1, "a thread must be set up");
  const std::int64_t k_steps = (args.k + kStep - 1) / kStep, bytes = k_steps * kTileRows * kStep;
  for (std::int64_t r = 0; r < (args.rows + kTileRows - 1) / kTileRows * kTileRows; ++r) {
    std::vector<float> row(static_cast<std::size_t>(k_steps * kStep), 0.0f);
    float largest = 0.0f;
    for (std::int64_t k = 0; k < args.k && r < args.rows; ++k) {
      const T value = static_cast<const T*>(args.x)[r * args.x_stride + k];
      if constexpr (sizeof(T) == 4)
        row[k] = value;
      else
        row[k] = float_of(value);
      largest = std::max(largest, std::fabs(row[k]));
    }
    const float scale = largest > 0.0f ? largest / 127.0f : 1.0f;
    char* tile = args.to + r / kTileRows * (bytes + kTileRows * 4);
    std::memcpy(tile + bytes + r % kTileRows * 4, &scale, 4);
    for (std::int64_t k = 0; k < k_steps * kStep; ++k)
      tile[(k / kStep * kTileRows + r % kTileRows) * kStep + k % kStep] =
          static_cast<char>(std::lrint(row[k] / scale));
  }
}

void multiply(const ProductArgs& args) {
  CHECK(begun == 1, "a thread must be set up");
  for (std::int64_t i = 0; i < args.n_before; ++i) args.finish(args.before[i], kTileRows);
  const std::int8_t* panel = reinterpret_cast<const std::int8_t*>(args.panel);
  for (std::int64_t r = 0; r < args.row_tiles * kTileRows; ++r)
    for (std::int64_t n = 0; n < kWidth; ++n) {
      const char* tile = args.x + r / kTileRows * args.row_tile_bytes;
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < args.k_steps * kStep; ++k) {
        const char* at = tile + (k / kStep * kTileRows + r % kTileRows) * kStep + k % kStep;
        const int x = static_cast<signed char>(*at);
        sum += x * panel[(k / kStep * kWidth + n) * kStep + k % kStep];
      }
      std::memcpy(args.acc + r * kWidth + n, &sum, 4);
    }
}

template <int element, int activation>
void finish(Finish& one, std::int64_t) {
  static const float ones[kWidth] = {1, 1, 1, 1, 1, 1, 1, 1}, zeros[kWidth] = {};
  for (std::int64_t r = 0; r < one.args.rows; ++r)
    for (std::int64_t n = 0; n < kWidth; ++n) {
      float scale, &value = one.args.acc[r * kWidth + n];
      std::int32_t sum;
      std::memcpy(&scale, one.tail + 4 * r, 4);
      std::memcpy(&sum, &value, 4);
      const double linear = double(sum) * scale * one.args.scale[n] + one.args.bias[n];
      value = static_cast<float>(activate_reference(static_cast<Activation>(activation), linear));
      if (one.by != nullptr) value *= one.by[r * kWidth + n];
    }
  one.activated = one.written = one.args.rows;
  if (one.keep) return;
  EpilogueArgs args = one.args;
  args.scale = ones;
  args.bias = zeros;
  kGenericKernels.epilogue[element][0](args);
}

Product make_product() {
  Product row{};
  row.weights = WeightType::int8;
  row.arithmetic = Arithmetic::int8;
  row.least_rows[0] = 2;
  row.least_rows[1] = kNever;
  row.most_rows = kAlways;
  row.tile_rows = kTileRows;
  row.row_tiles = 2;
  row.step_inputs = kStep;
  row.step_bytes = kTileRows * kStep;
  row.tail_bytes = kTileRows * 4;
  row.panel_step_bytes = kStep * kWidth;
  row.begin = [] { ++begun; };
  row.end = [] { --begun; };
  row.prepare[0] = prepare<float>;
  row.prepare[1] = prepare<std::uint16_t>;
  row.multiply = multiply;
  const FinishFn fp32[] = {finish<0, 0>, finish<0, 1>, finish<0, 2>, finish<0, 3>, finish<0, 4>};
  std::copy(fp32, fp32 + kActivations, row.finish[0]);
  return row;
}

struct Layer {
  std::vector<float> weight, bias, scale, stored;
  std::vector<char> packed;
  Packed get;

  Layer(std::int64_t n, std::int64_t k, unsigned seed)
      : weight(random_floats(n * k, seed)), bias(random_floats(n, seed + 1)), scale(n), stored(n * k) {
    const Isa isa = Isa::generic;
    packed.resize(packed_bytes(isa, WeightType::int8, n, k));
    pack_weight(isa, WeightType::int8, weight.data(), k, 1, n, k, packed.data(), scale.data());
    unpack_weight(isa, WeightType::int8, packed.data(), scale.data(), n, k, stored.data());
    get = {WeightType::int8, n, k, packed.data(), scale.data(), bias.data()};
  }
  // [rows, n] of x [rows, k].
  std::vector<double> plain(const std::vector<double>& x, Activation activation) const {
    const std::int64_t rows = static_cast<std::int64_t>(x.size()) / get.k;
    std::vector<double> y;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t i = 0; i < get.n; ++i) {
        double sum = bias[i];
        for (std::int64_t j = 0; j < get.k; ++j) sum += x[r * get.k + j] * stored[i * get.k + j];
        y.push_back(activate_reference(activation, sum));
      }
    return y;
  }
};

// What a call has in common: x [m, 60] with k of its columns read, y [m, 90] with n of them made, a residual.
struct Around {
  std::int64_t m;
  std::vector<std::int64_t> in, out;
  std::vector<float> x, residual, y;

  Around(std::int64_t m, std::int64_t k, std::int64_t n)
      : m(m),
        in(random_kept(k, 60, 1)),
        out(random_kept(n, 90, 2)),
        x(random_floats(m * 60, 3)),
        residual(random_floats(m * 90, 4)),
        y(m * 90 + 8, kPoison) {}
  template <class Call>
  void aim(Call& call, int threads) {
    call.m = m, call.in_features = call.x_stride = 60, call.n_out = call.y_stride = call.residual_stride = 90;
    call.x = x.data(), call.in_index = in.data(), call.out_index = out.data();
    call.residual = residual.data(), call.y = y.data(), call.threads = threads;
  }
  std::vector<double> taken() const {
    std::vector<double> rows;
    for (std::int64_t r = 0; r < m; ++r)
      for (std::int64_t column : in) rows.push_back(x[r * 60 + column]);
    return rows;
  }
  // dB of `want` [m, n] against what y differs from it; channels outside are exact.
  double sqnr(const std::vector<double>& want) const {
    double signal = 0.0, noise = 0.0;
    for (std::int64_t r = 0; r < m; ++r) {
      std::size_t next = 0;
      for (std::int64_t c = 0; c < 90; ++c) {
        const double extra = residual[r * 90 + c], got = y[r * 90 + c];
        if (next == out.size() || out[next] != c) {
          CHECK(got == extra, "row %ld column %ld: %g, want %g", long(r), long(c), got, extra);
          continue;
        }
        const double one = want[r * out.size() + next++];
        signal += one * one;
        noise += (got - extra - one) * (got - extra - one);
      }
    }
    for (std::size_t i = m * 90; i < y.size(); ++i) CHECK(y[i] == kPoison, "overrun");
    return 10 * std::log10(signal / noise);
  }
};

}  // namespace

int main() {
  const Product product = make_product();
  Kernels table = kernels(Isa::generic);
  table.products[0] = &product;
  Packed int8, bf16;
  int8.type = WeightType::int8;
  bf16.type = WeightType::bf16;
  CHECK(product_for(table, int8, Element::fp32, 2) == &product, "two rows go through it");
  CHECK(product_for(table, int8, Element::fp32, 1) == nullptr, "one row does not");
  CHECK(product_for(table, int8, Element::bf16, 9) == nullptr, "nor do rows in bf16");
  CHECK(product_for(table, bf16, Element::fp32, 9) == nullptr, "nor do other weights");

  // x is rounded to 127 steps of the largest of its row, of about 40 values: an error of 0.29 steps, largest
  // 2.3 deviations, so 127 / 2.3 / 0.29 = 190 to one, 46 dB. Between the layers another such rounding.
  const Layer layer(53, 37, 5), up(61, 37, 6), gate(61, 37, 7), down(53, 61, 8);
  for (std::int64_t m : {1, 2, 7, 40})
    for (int threads : {1, 2}) {
      Around linear(m, 37, 53), mlp(m, 37, 53), gated(m, 37, 53);
      LinearCall call;
      linear.aim(call, threads);
      call.weight = layer.get;
      call.activation = Activation::silu;
      compact_linear(table, call);
      const double first = linear.sqnr(layer.plain(linear.taken(), Activation::silu));

      MlpCall both;
      mlp.aim(both, threads);
      both.up = up.get, both.down = down.get, both.activation = Activation::gelu;
      compact_mlp(table, both);
      const double second = mlp.sqnr(down.plain(up.plain(mlp.taken(), Activation::gelu), Activation::none));

      gated.aim(both, threads);
      both.gate = gate.get;
      compact_mlp(table, both);
      std::vector<double> inner = up.plain(gated.taken(), Activation::none);
      const std::vector<double> by = gate.plain(gated.taken(), Activation::gelu);
      for (std::size_t i = 0; i < inner.size(); ++i) inner[i] *= by[i];
      const double third = gated.sqnr(down.plain(inner, Activation::none));
      std::printf("m=%ld threads=%d: %.1f %.1f %.1f dB\n", long(m), threads, first, second, third);
      const bool is_exact = m == 1;  // fp32 arithmetic
      for (double got : {first, second, third})
        CHECK(is_exact ? got > 100.0 : got > 36.0 && got < 60.0, "m=%ld threads=%d: %.1f dB", long(m),
              threads, got);
    }
  CHECK(begun == 0, "a thread must be as it was");
  return 0;
}
