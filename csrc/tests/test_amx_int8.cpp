// AMX, int8: what test_int8 does not see. Which rows go through tiles, that nothing is read past the end of a
// weight, that tiles are released, that a row of y does not depend on how many there are, the peak.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "cpu/table.h"
#include "loops/products.h"
#include "tests/amx_emulator.h"
#include "tests/check.h"

using namespace prunekern;

namespace {

constexpr std::int64_t kLeastRows = 5;  // that go through tiles

// Memory that ends where a page ends that nobody may touch.
class Fenced {
 public:
  explicit Fenced(std::int64_t bytes) {
    const std::int64_t page = sysconf(_SC_PAGESIZE), size = round_up(bytes, page);
    length_ = static_cast<std::size_t>(size + page);
    start_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(start_ != MAP_FAILED && mprotect(start_ + size, page, PROT_NONE) == 0, "no fence");
    memory_ = start_ + size - bytes;
  }
  ~Fenced() { munmap(start_, length_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  char* get() const { return memory_; }

 private:
  std::size_t length_;
  char *start_, *memory_;
};

const Product& product_of(const Packed& weight, std::int64_t m, Element element = Element::fp32) {
  const Product* product = product_for(kernels(Isa::amx), weight, element, m);
  CHECK(product != nullptr && product->arithmetic == Arithmetic::int8, "%ld rows", long(m));
  return *product;
}

bool is_tiles(const Product& product) { return product.begin != nullptr; }

void test_choice() {
  Packed weight;
  weight.type = WeightType::int8;
  weight.activations = Activations::int8;
  for (Element element : {Element::fp32, Element::bf16})
    for (std::int64_t m : {std::int64_t(1), kLeastRows - 1, kLeastRows, std::int64_t(1000)})
      CHECK(is_tiles(product_of(weight, m, element)) == (m >= kLeastRows), "%ld rows", long(m));
}

// Every row by tiles, and by vector units where it comes with few others: not a bit may differ.
void test_calls(std::int64_t n, std::int64_t k) {
  const std::int64_t m = 75;
  const std::vector<float> plain = random_floats(n * k, 1), bias = random_floats(n, 2),
                           x = random_floats(m * k, 3);
  const Fenced packed(packed_bytes(Isa::amx, WeightType::int8, n, k));
  std::vector<float> scale(n), y(m * n), few(m * n);
  pack_weight(Isa::amx, WeightType::int8, plain.data(), k, 1, n, k, packed.get(), scale.data());
  LinearCall call;
  call.in_features = call.x_stride = k;
  call.n_out = call.y_stride = n;
  call.weight = {WeightType::int8, n, k, packed.get(), scale.data(), bias.data(), Activations::int8};
  call.activation = Activation::silu;
  const auto run = [&](std::int64_t rows, std::int64_t first, std::vector<float>& to) {
    call.m = rows;
    call.x = x.data() + first * k;
    call.y = to.data() + first * n;
    compact_linear(Isa::amx, call);
    CHECK(!amx_in_use(), "tiles must be released after a call");
  };
  for (std::int64_t first = 0; first < m; first += kLeastRows - 2)
    run(std::min(kLeastRows - 2, m - first), first, few);
  for (std::int64_t rows : {kLeastRows, std::int64_t(16), std::int64_t(17), std::int64_t(33), m}) {
    std::fill(y.begin(), y.end(), 1e30f);
    run(rows, 0, y);
    CHECK(std::memcmp(y.data(), few.data(), static_cast<std::size_t>(rows * n) * 4) == 0,
          "n=%ld k=%ld: %ld rows differ from the same rows by vectors", long(n), long(k), long(rows));
  }
}

void test_peaks() {
  Packed weight;
  weight.type = WeightType::int8;
  weight.activations = Activations::int8;
  const Product& product = product_of(weight, kLeastRows);
  CHECK(product.peak(3) == 3 * 4 * 16 * 16 * 64 * 2, "four products of 16 x 64 by 64 x 16 a step");
  CHECK(run_peak(Isa::amx, 3, Arithmetic::int8) == product.peak(3), "that of tiles is the one to reach");
  CHECK(run_peak(Isa::amx, 3, Arithmetic::bf16) == product.peak(3) / 2, "half as many inputs");
  CHECK(!amx_in_use(), "tiles must be released");
}

}  // namespace

int main() {
  const std::string tiles = provide_amx();
  if (tiles.empty()) {
    std::printf("not run: this CPU lacks AVX-512 with bf16 conversions\n");
    return 0;
  }
  CHECK(amx_verdict().works, "%s", amx_verdict().reason.c_str());
  test_choice();
  for (std::int64_t n : {1, 33, 96})
    for (std::int64_t k : {1, 16, 63, 64, 65, 100, 208, 768}) test_calls(n, k);
  test_peaks();
  std::printf("%s tiles\n", tiles.c_str());
  return 0;
}
