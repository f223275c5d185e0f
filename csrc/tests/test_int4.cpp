// int4 weights, every instruction set: what packing makes of them; the sums of int4 x int8 bit by bit against
// a plain loop on the codes; whole calls against float64 on the rounded numbers, and in fp32 arithmetic on
// what the codes stand for; weights and rows that cannot be rounded.
#include "kernels/product.h"
#include "loops/products.h"
#include "ops/half.h"
#include "tests/amx_emulator.h"
#include "tests/rounded.h"

#ifdef PRUNEKERN_EVEX_VNNI
namespace prunekern {
extern const Product kEvexVnniInt4;
}
#endif

namespace {

// Panels read by hand.
struct Panels {
  std::int64_t width, groups;
  char* data;

  char* group(std::int64_t channel, std::int64_t g) const {
    return data + (channel / width * groups + g) * 18 * width;
  }
  int q(std::int64_t channel, std::int64_t j) const {
    const std::int64_t i = j % 32, c = channel % width;
    const unsigned char both = group(channel, j / 32)[(i % 16 / 4 * width + c) * 4 + i % 4];
    return (i < 16 ? both % 16 : both / 16) - 8;
  }
  float scale(std::int64_t channel, std::int64_t g) const {
    std::uint16_t half;
    std::memcpy(&half, group(channel, g) + 16 * width + 2 * (channel % width), 2);
    return from_half(half);
  }
};

struct Weight {
  std::int64_t n, k;
  std::vector<float> plain, bias;
  std::vector<char> memory;
  Packed packed;
  Panels panels;

  Weight(Isa isa, std::int64_t n, std::int64_t k, unsigned seed)
      : n(n), k(k), plain(random_floats(n * k, seed)), bias(random_floats(n, seed + 1)) {
    memory.resize(packed_bytes(isa, WeightType::int4, n, k) + 64);
    char* data = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    panels = {panel_width(isa), (k + 31) / 32, data};
    packed = {WeightType::int4, n, k, data, nullptr, bias.data(), Activations::int8};
    pack(isa);
  }
  void pack(Isa isa) { pack_weight(isa, WeightType::int4, plain.data(), k, 1, n, k, panels.data, nullptr); }
  // A rounding for each group, the row's scale and the bias.
  Sum sum(const std::vector<int>& x, std::int64_t channel) const {
    Sum all{0.0, 0.0, static_cast<int>(panels.groups) + 3};
    for (std::int64_t g = 0; g < panels.groups; ++g) {
      double group = 0.0;
      for (std::int64_t j = 32 * g; j < std::min(k, 32 * g + 32); ++j)
        group += x[j] * panels.q(channel, j) * double(panels.scale(channel, g));
      all.value += group;
      all.size += std::fabs(group);
    }
    return all;
  }
};

void check_halves() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = from_half(half);
    if (std::isnan(value)) {
      CHECK(std::isnan(from_half(to_half(value))), "%x", half);
      continue;
    }
    CHECK(to_half(value) == half, "%x: %g came back as %x", half, value, to_half(value));
    if (!std::isfinite(value) || !std::isfinite(from_half(half + 1))) continue;
    const float middle = (value + from_half(half + 1)) / 2;
    if (bits % 0x8000 == 0x7fff) continue;
    CHECK(to_half(middle) == half + half % 2, "%x: %g is in the middle", half, middle);
  }
  CHECK(to_half(65519.9f) == 0x7bff && to_half(65520.0f) == 0x7c00 && to_half(-1e30f) == 0xfc00, "the end");
  CHECK(to_half(0x1p-25f) == 0 && to_half(0x1.8p-25f) == 1 && to_half(-0.0f) == 0x8000, "the beginning");
}

// Of n x k weights: no group loses more than its codes must, and all together what is said of normal weights.
void check_loss(Isa isa, std::int64_t n, std::int64_t k, double least_db) {
  const Weight weight(isa, n, k, 11);
  std::vector<float> back(n * k);
  unpack_weight(isa, WeightType::int4, weight.panels.data, nullptr, n, k, back.data());
  double size = 0.0, loss = 0.0;
  for (std::int64_t channel = 0; channel < n; ++channel)
    for (std::int64_t g = 0; g < weight.panels.groups; ++g) {
      float largest = 0.0f;
      double lost = 0.0, plain_lost = 0.0;
      for (std::int64_t j = 32 * g; j < std::min(k, 32 * g + 32); ++j)
        largest = std::fmax(largest, std::fabs(weight.plain[channel * k + j]));
      const float step = from_half(to_half(largest / 7));
      for (std::int64_t j = 32 * g; j < 32 * g + 32; ++j) {
        if (j >= k) {
          CHECK(weight.panels.q(channel, j) == 0, "padding is zero");
          continue;
        }
        const float want = weight.plain[channel * k + j], got = back[channel * k + j];
        CHECK(got == weight.panels.q(channel, j) * weight.panels.scale(channel, g), "unpacked %g", got);
        lost += std::pow(double(want) - got, 2);
        plain_lost += std::pow(double(want) - std::nearbyint(want / step) * step, 2);
        size += double(want) * want;
      }
      loss += lost;
      // One of its four scales is 1/7; the fit may move it for the better of all codes but fp16's rounding.
      CHECK(lost <= 1.3 * plain_lost + 1e-4 * largest * largest,
            "channel %ld group %ld: %g, %g with a plain scale", long(channel), long(g), lost, plain_lost);
    }
  std::vector<char> again(weight.memory.size());
  std::vector<float> twice(n * k);
  pack_weight(isa, WeightType::int4, back.data(), k, 1, n, k, again.data(), nullptr);
  unpack_weight(isa, WeightType::int4, again.data(), nullptr, n, k, twice.data());
  CHECK(twice == back, "%s: what is rounded must stay", name(isa));
  const double db = 10 * std::log10(size / loss);
  CHECK(db > least_db, "%s: %ld x %ld: %g dB", name(isa), long(n), long(k), db);
  if (n > 100) std::printf("%s: %.2f dB\n", name(isa), db);
}

// The product's own sums. With scales of 1 they are whole numbers, exact in fp32 up to 2^24.
void check_sums(const Product& product, Isa isa, std::int64_t k, bool extreme) {
  const std::int64_t width = panel_width(isa);
  Weight weight(isa, width, k, 3);
  std::mt19937 engine(4);
  for (std::int64_t g = 0; g < weight.panels.groups; ++g) {
    char* group = weight.panels.group(0, g);
    // The extreme ones: -8 in one channel, 7 in the next.
    for (std::int64_t i = 0; i < 16 * width; ++i)
      group[i] = static_cast<char>(extreme ? (i / 4 % 2 == 0 ? 0x00 : 0xff) : engine());
    for (std::int64_t i = 0; i < width; ++i) std::memcpy(group + 16 * width + 2 * i, "\0\x3c", 2);
  }
  for (std::int64_t rows = 1; rows <= group_rows(product); ++rows) {
    std::vector<float> x = random_floats(rows * k, 5);
    if (extreme)
      for (std::int64_t i = 0; i < rows * k; ++i) x[i] = i / k % 2 == 0 ? 2.0f : -2.0f;
    std::vector<char> tiles(prepared_bytes(product, rows, k) + 64, 0x5a);
    std::vector<float> acc(group_rows(product) * width + kMaxWidth, kPoison);
    PrepareArgs prepare{};
    prepare.x = x.data();
    prepare.x_stride = prepare.k = k;
    prepare.rows = rows;
    prepare.to = tiles.data();
    product.prepare[0](prepare);
    ProductArgs args{};
    args.x = tiles.data();
    args.row_tiles = ceil_div(rows, product.tile_rows);
    args.row_tile_bytes = row_tile_bytes(product, k);
    args.panel = weight.panels.data;
    args.k_steps = steps(product, k);
    args.acc = acc.data();
    args.rows = rows;
    product.multiply(args);
    for (std::int64_t r = 0; r < rows; ++r) {
      const Rounded row(std::vector<float>(x.begin() + r * k, x.begin() + (r + 1) * k));
      for (std::int64_t i = 0; i < width; ++i) {
        std::int64_t want = 0;
        for (std::int64_t j = 0; j < k; ++j) want += row.q[j] * weight.panels.q(i, j);
        CHECK(acc[r * width + i] == static_cast<float>(want),
              "%s k=%ld rows=%ld row %ld channel %ld: %g, want %ld", name(isa), long(k), long(rows), long(r),
              long(i), acc[r * width + i], long(want));
      }
    }
    CHECK(tiles[prepared_bytes(product, rows, k)] == 0x5a, "wrote past the row tiles");
  }
}

void check_all_sums(const Product& product, Isa isa) {
  for (std::int64_t k : {1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 372, 768})
    for (bool extreme : {false, true}) check_sums(product, isa, k, extreme);
}

// fp32 arithmetic on what the codes stand for: few rows and many, chunks of k.
void check_floating(const Kernels& table, Isa isa, std::int64_t m, std::int64_t n, std::int64_t k) {
  Weight weight(isa, n, k, 21);
  weight.packed.activations = Activations::floating;
  std::vector<float> back(n * k), y(m * n, kPoison);
  unpack_weight(isa, WeightType::int4, weight.panels.data, nullptr, n, k, back.data());
  const std::vector<float> x = random_floats(m * k, 22);
  LinearCall call;
  call.m = m;
  call.in_features = call.x_stride = k;
  call.n_out = call.y_stride = n;
  call.weight = weight.packed;
  call.x = x.data();
  call.y = y.data();
  compact_linear(table, call);
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = weight.bias[i], size = std::fabs(sum);
      for (std::int64_t j = 0; j < k; ++j) {
        sum += double(x[r * k + j]) * back[i * k + j];
        size += std::fabs(double(x[r * k + j]) * back[i * k + j]);
      }
      const double bound = 1.2 * kEps * std::sqrt(double(k + 2)) * size;
      CHECK(std::fabs(y[r * n + i] - sum) <= bound, "%s m=%ld n=%ld k=%ld: %g, want %g", name(isa), long(m),
            long(n), long(k), y[r * n + i], sum);
    }
}

// Six channels of one group each: an infinity, a NaN, zeros, numbers that are too large, too small, just
// small.
void check_odd_weights(const Kernels& table, Isa isa) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float odd[] = {-infinity, std::numeric_limits<float>::quiet_NaN(), 0.0f, 5e5f, 1e-7f, -1e-6f};
  const std::int64_t n = 6, k = 33;
  Weight weight(isa, n, k, 31);
  std::fill(weight.plain.begin(), weight.plain.end(), 0.0f);
  for (std::int64_t i = 0; i < n; ++i) weight.plain[i * k + 32] = odd[i];
  weight.pack(isa);
  std::vector<float> x(k, 1.0f), y(n), back(n * k);
  unpack_weight(isa, WeightType::int4, weight.panels.data, nullptr, n, k, back.data());
  for (Activations activations : {Activations::int8, Activations::floating}) {
    LinearCall call;
    call.m = 1;
    call.in_features = call.x_stride = k;
    call.n_out = call.y_stride = n;
    call.weight = weight.packed;
    call.weight.bias = nullptr;
    call.weight.activations = activations;
    call.x = x.data();
    call.y = y.data();
    compact_linear(table, call);
    for (std::int64_t i : {0, 1, 3})
      CHECK(std::isnan(y[i]) && std::isnan(back[i * k + 32]), "%g: %g", odd[i], y[i]);
    for (std::int64_t i : {2, 4}) CHECK(y[i] == 0.0f, "%g: %g", odd[i], y[i]);
    CHECK(std::fabs(y[5] / odd[5] - 1) < 0.05, "%g: %g", odd[5], y[5]);
  }
}

void check_choice(const Kernels& table, Isa isa) {
  Packed weight;
  weight.type = WeightType::int4;
  weight.k = kMostInt8Inputs + 1;  // of no matter here
  const auto quantizes = [&](Activations activations, std::int64_t m) {
    weight.activations = activations;
    return product_for(table, weight, Element::fp32, m) != nullptr;
  };
  for (std::int64_t m : {1, 6, 7, 1000}) {
    CHECK(quantizes(Activations::int8, m), "asked for, at any number of rows");
    CHECK(!quantizes(Activations::floating, m), "not asked for");
    CHECK(quantizes(Activations::automatic, m) == (isa != Isa::generic), "%s: faster", name(isa));
  }
}

void check_product(const Product& product, const Kernels& table, Isa isa) {
  check_all_sums(product, isa);
  check_table<Weight>(table, isa);
}

}  // namespace

int main() {
  provide_amx();
  check_halves();
  for (Isa isa : supported_isas()) {
    const Kernels& table = kernels(isa);
    check_loss(isa, 200, 640, 21.7);
    for (std::int64_t k : {1, 31, 33, 372}) check_loss(isa, 33, k, k == 1 ? 60.0 : 20.0);
    bool found = false;
    for (const Product* product : table.products)
      if (product != nullptr && product->weights == WeightType::int4) {
        check_product(*product, table, isa);
        found = true;
      }
    CHECK(found, "%s has no int4", name(isa));
    for (std::int64_t m : {1, 5, 30})
      for (std::int64_t k : {1, 31, 33, 372, 1700}) check_floating(table, isa, m, 37, k);
    check_floating(table, isa, 150, 40, 3300);
    check_odd_weights(table, isa);
    check_choice(table, isa);
  }
#ifdef PRUNEKERN_EVEX_VNNI
  const std::vector<Isa> isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), Isa::avx512_vnni) != isas.end()) {
    Kernels table = kernels(Isa::avx2);
    for (const Product*& product : table.products)
      if (product != nullptr && product->weights == WeightType::int4) product = &kEvexVnniInt4;
    check_product(kEvexVnniInt4, table, Isa::avx2);
    std::printf("avx2_vnni: by instructions of AVX-512\n");
  } else {
    std::printf("avx2_vnni: not run by instructions of AVX-512, which this CPU lacks\n");
  }
#endif
  return 0;
}
