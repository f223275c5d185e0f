// int8 x int8, every instruction set: sums bit by bit against a plain loop; then whole calls against float64
// on the rounded numbers; rows that cannot be rounded; what is refused.
#include "kernels/product.h"
#include "loops/products.h"
#include "tests/amx_emulator.h"
#include "tests/rounded.h"

#ifdef PRUNEKERN_EVEX_VNNI
namespace prunekern {
extern const Product kEvexVnniInt8;
}
#endif

namespace {

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
  // The sum to fp32, two scales and the bias: 4 roundings.
  Sum sum(const std::vector<int>& x, std::int64_t channel) const {
    double sum = 0.0;
    for (std::int64_t j = 0; j < k; ++j) sum += x[j] * q(channel, j);
    sum *= scale[channel];
    return {sum, std::fabs(sum), 4};
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
  weight.type = WeightType::bf16;  // rounds x to bf16
  for (std::int64_t m : {1, 6, 7, 1000}) CHECK(chosen(m) == Arithmetic::fp32, "not asked for");
  weight.type = WeightType::int8;
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
  CHECK(message == "compact_linear: activations int8 go with an int8 or int4 weight (got fp32)", "%s",
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
      if (product != nullptr && product->weights == WeightType::int8) check_all_sums(*product, isa);
    check_table<Weight>(table, isa);
    check_choice(table);
  }
#ifdef PRUNEKERN_EVEX_VNNI
  const std::vector<Isa> isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), Isa::avx512_vnni) != isas.end()) {
    Kernels table = kernels(Isa::avx2);
    table.products[0] = &kEvexVnniInt8;
    check_all_sums(kEvexVnniInt8, Isa::avx2);
    check_table<Weight>(table, Isa::avx2);
    std::printf("avx2_vnni: by instructions of AVX-512\n");
  } else {
    std::printf("avx2_vnni: not run by instructions of AVX-512, which this CPU lacks\n");
  }
#endif
  check_refusals();
  return 0;
}
