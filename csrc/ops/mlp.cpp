// Two or three linears and the activation between them, block by block of rows.
//
// What fusing can win: an intermediate of [1024, 3072] fp32 is 12.6 MB, out of L2 and back, 1 ms of about 60
// at one core's 24 GB/s. A block of rows whose intermediate stays in half of L2 (85 rows there) saves that
// and reads the weights as often as compact_linear does for `down` alone.
#include "ops/mlp.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/table.h"
#include "loops/mlp.h"
#include "loops/panels.h"
#include "loops/products.h"
#include "loops/scratch.h"
#include "loops/threads.h"
#include "ops/bf16.h"
#include "ops/check_activations.h"
#include "ops/check_index.h"
#include "ops/linear.h"

namespace prunekern {
namespace {

constexpr std::int64_t kFewRows = 8;  // here threads share weights, not rows
// Every block streams all weights, so that few rows wait for them: with 64 rows of 2,304 channels, half of
// L2, 128 rows take 4 % longer than two calls; with all 128 nothing.
constexpr std::int64_t kLeastBlock = 140;

const void* row(const void* x, std::int64_t r, std::int64_t stride, Element element) {
  return x == nullptr ? nullptr : static_cast<const char*>(x) + r * stride * element_bytes(element);
}

// Values from row to row between the layers: whole lines, an odd number of them, so that the rows of a tile
// do not meet in one set of L1. Rows of 3,072 floats side by side would have to be copied apart (1 to 2 %).
std::int64_t between_stride(std::int64_t n, Element element) {
  const std::int64_t line = kLine / element_bytes(element);
  return (ceil_div(n, line) | 1) * line;
}

// up and gate: x -> [rows, up.n], rows `stride` values apart.
void run_up(const Kernels& kernels, const MlpCall& call, const Packed& weight, Activation activation,
            Range rows, int threads, void* y, std::int64_t stride) {
  LinearCall up;
  up.m = rows.size();
  up.in_features = call.in_features;
  up.n_out = weight.n;
  up.weight = weight;
  up.element = call.element;
  up.x = row(call.x, rows.begin, call.x_stride, call.element);
  up.x_stride = call.x_stride;
  up.in_index = call.in_index;
  up.y = y;
  up.y_stride = stride;
  up.activation = activation;
  up.threads = threads;
  compact_linear(kernels, up);
}

void run_down(const Kernels& kernels, const MlpCall& call, const void* x, std::int64_t stride, Range rows,
              int threads) {
  LinearCall down;
  down.m = rows.size();
  down.in_features = down.weight.k = call.up.n;
  down.n_out = call.n_out;
  down.weight = call.down;
  down.element = call.element;
  down.x = x;
  down.x_stride = stride;
  down.out_index = call.out_index;
  down.residual = row(call.residual, rows.begin, call.residual_stride, call.element);
  down.residual_stride = call.residual_stride;
  down.y = const_cast<void*>(row(call.y, rows.begin, call.y_stride, call.element));
  down.y_stride = call.y_stride;
  down.threads = threads;
  compact_linear(kernels, down);
}

void multiply(void* h, const void* by, std::int64_t count, Element element) {
  if (element == Element::fp32) {
    float* to = static_cast<float*>(h);
    const float* from = static_cast<const float*>(by);
    for (std::int64_t i = 0; i < count; ++i) to[i] *= from[i];
  } else {
    std::uint16_t* to = static_cast<std::uint16_t*>(h);
    const std::uint16_t* from = static_cast<const std::uint16_t*>(by);
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_bf16(from_bf16(to[i]) * from_bf16(from[i]));
  }
}

void run_rows(const Kernels& kernels, const MlpCall& call, Range rows, std::int64_t block_rows, int threads) {
  static thread_local Scratch scratch;
  const bool gated = call.gate.data != nullptr;
  // Without rows one empty block still has its arguments checked.
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(rows.size(), block_rows), 1);
  const std::int64_t stride = between_stride(call.up.n, call.element);
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Range part = share(rows.size(), b, blocks);
    const Range block{rows.begin + part.begin, rows.begin + part.end};
    const std::int64_t size = block.size() * stride * element_bytes(call.element);
    char* h = scratch.get<char>(gated ? 2 * size : size);
    if (gated) {
      run_up(kernels, call, call.gate, call.activation, block, threads, h, stride);
      run_up(kernels, call, call.up, Activation::none, block, threads, h + size, stride);
      for (std::int64_t r = 0; r < block.size(); ++r) {
        const std::int64_t begin = r * stride * element_bytes(call.element);
        multiply(h + begin, h + size + begin, call.up.n, call.element);
      }
    } else {
      run_up(kernels, call, call.up, call.activation, block, threads, h, stride);
    }
    run_down(kernels, call, h, stride, block, threads);
  }
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("compact_mlp: " + message);
}

std::string shape(const Packed& weight) {
  return std::to_string(weight.n) + " x " + std::to_string(weight.k);
}

// What compact_linear would say of a layer nobody passed to it.
void check(const MlpCall& call) {
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
  require(call.m >= 0 && call.in_features >= 0 && call.n_out >= 0, "sizes must not be negative");
  for (const Packed* weight : {&call.up, &call.gate, &call.down}) {
    require(weight->n >= 0 && weight->k >= 0, "sizes must not be negative");
    require(!layout(weight->type).is_scaled || weight->scale != nullptr || weight->data == nullptr ||
                weight->n == 0,
            std::string("an ") + name(weight->type) + " weight needs its scale (got none)");
    check_activations("compact_mlp", *weight);
  }
  require(call.in_index != nullptr || call.up.k == call.in_features || call.up.k == 0,
          "up reads " + std::to_string(call.up.k) + " inputs, x has " + std::to_string(call.in_features));
  require(call.out_index != nullptr || call.down.n == call.n_out || call.down.n == 0,
          "down makes " + std::to_string(call.down.n) + " outputs, n_out is " + std::to_string(call.n_out));
  require(call.down.k == call.up.n,
          "down must read what up makes (up is " + shape(call.up) + ", down " + shape(call.down) + ")");
  require(call.gate.data == nullptr || (call.gate.n == call.up.n && call.gate.k == call.up.k),
          "gate must have the shape of up (up is " + shape(call.up) + ", gate " + shape(call.gate) + ")");
  if (call.in_index != nullptr)
    check_index("compact_mlp", "in_index", call.in_index, call.up.k, call.in_features);
  if (call.out_index != nullptr)
    check_index("compact_mlp", "out_index", call.out_index, call.down.n, call.n_out);
}

// The row of the table that multiplies every layer, `m` rows at a time, so that the rows between the layers
// can stay as it wants them; or null.
const Product* product_of_all(const Kernels& kernels, const MlpCall& call, std::int64_t m) {
  if (call.up.n == 0 || call.down.n == 0 || call.n_out == 0) return nullptr;
  const Product* product = product_for(kernels, call.up, call.element, m);
  for (const Packed* weight : {&call.gate, &call.down})
    if (weight->data != nullptr && product_for(kernels, *weight, call.element, m) != product) return nullptr;
  return product;
}

}  // namespace

void compact_mlp(const Kernels& kernels, const MlpCall& call) {
  check(call);
  const std::int64_t row_tiles = ceil_div(call.m, kernels.rows);
  // With fewer tiles of rows than threads the threads share the panels of each layer instead.
  const bool by_rows = call.threads == 1 || (call.m > kFewRows && row_tiles >= call.threads);
  const Product* product = by_rows ? product_of_all(kernels, call, call.m / call.threads) : nullptr;
  static thread_local Windows kept_windows;
  static thread_local Reads kept_reads;
  Windows& windows = kept_windows;
  Reads& reads = kept_reads;
  if (product != nullptr) {
    make_windows(kernels, call.out_index, call.down.n, call.n_out, windows);
    if (call.in_index != nullptr) make_reads(kernels, call.in_index, call.up.k, call.in_features, reads);
  }
  const Mlp mlp{call, kernels, windows, reads};
  const std::int64_t row_bytes = std::max<std::int64_t>(call.up.n * element_bytes(call.element), 1) *
                                 (call.gate.data != nullptr ? 2 : 1);
  const std::int64_t block = std::max(l2_bytes() / 2 / row_bytes, kLeastBlock);
  parallel(by_rows ? call.threads : 1, [&](int i, int count) {
    const Range rows = share(call.m, i, count);
    if (product != nullptr)
      prepared_mlp(*product, mlp, rows);
    else
      run_rows(kernels, call, rows, block, by_rows ? 1 : call.threads);
  });
}

void compact_mlp(Isa isa, const MlpCall& call) { compact_mlp(kernels(isa), call); }

}  // namespace prunekern
