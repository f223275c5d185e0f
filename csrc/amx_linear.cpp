#include "amx_linear.h"

#include <algorithm>

#include "amx_blocks.h"
#include "packed.h"
#include "parallel.h"

namespace prunekern {
namespace {

constexpr std::int64_t kPairRows = 2 * kTileRows;

// Memory of one thread, kept between calls.
struct Workspace {
  Scratch tiles, between, gathered, bias, gate_bias, down_bias;
};

Workspace& workspace() {
  static thread_local Workspace kept;
  return kept;
}

// What both kinds of call say of x.
struct Input {
  const void* x;
  std::int64_t stride, in_features, k;
  Element element;
  const Reads* reads;  // null: all columns
};

// Rows [rows) of x as tiles: bf16, kept columns side by side.
AmxRows take_tiles(const Input& input, const Kernels& kernels, Range rows, Workspace& memory) {
  std::uint16_t* tiles = memory.tiles.get<std::uint16_t>(amx_values(rows.size(), input.k));
  AmxTakeArgs args{};
  args.x = static_cast<const char*>(input.x) + rows.begin * input.stride * element_bytes(input.element);
  args.x_stride = input.stride;
  args.rows = rows.size();
  args.k = input.k;
  args.to = tiles;
  if (input.reads == nullptr) {
    amx_take(args, input.element == Element::bf16);
    return {tiles, rows.size()};
  }
  // A row tile at a time: 48 KB at k = 768, hot in L1 or L2 when it is rounded.
  const std::int64_t stride = round_up(input.k + kernels.vector, kernels.vector);
  TakeArgs gather{};
  gather.x_stride = input.stride;
  gather.columns = input.in_features;
  gather.reads = input.reads->data();
  gather.n_reads = static_cast<std::int64_t>(input.reads->size());
  gather.to = memory.gathered.get<float>(kTileRows * stride);
  gather.to_stride = stride;
  const char* x = static_cast<const char*>(args.x);
  args.x = gather.to;
  args.x_stride = stride;
  for (std::int64_t row = 0; row < rows.size(); row += kTileRows) {
    args.rows = gather.rows = std::min<std::int64_t>(kTileRows, rows.size() - row);
    gather.x = x + row * input.stride * element_bytes(input.element);
    args.to = tiles + amx_values(row, input.k);
    kernels.take[static_cast<int>(input.element)](gather);
    amx_take(args, false);
  }
  return {tiles, rows.size()};
}

// Block b of `blocks` that begin at whole pairs of row tiles.
Range block_of(Range rows, std::int64_t b, std::int64_t blocks) {
  const Range pairs = share(ceil_div(rows.size(), kPairRows), b, blocks);
  return {rows.begin + pairs.begin * kPairRows, std::min(rows.begin + pairs.end * kPairRows, rows.end)};
}

void run(const LinearCall& call, const Kernels& kernels, const Windows& windows, const Reads* reads,
         Range rows, Range panels) {
  Workspace& memory = workspace();
  const AmxSession session;
  const std::int64_t element = element_bytes(call.element);
  const AmxLayer layer = amx_layer(call.weight, call.activation, memory.bias);
  const Input input{call.x, call.x_stride, call.in_features, call.weight.k, call.element, reads};
  const std::int64_t blocks = ceil_div(rows.size(), amx_block_rows(call.weight.k));
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Range block = block_of(rows, b, blocks);
    AmxTarget target;
    target.windows = &windows;
    target.element = call.element;
    target.y = static_cast<char*>(call.y) + block.begin * call.y_stride * element;
    target.y_stride = call.y_stride;
    if (call.residual != nullptr)
      target.residual =
          static_cast<const char*>(call.residual) + block.begin * call.residual_stride * element;
    target.residual_stride = call.residual_stride;
    amx_multiply(take_tiles(input, kernels, block, memory), layer, nullptr, panels, target, b + 1 < blocks);
  }
}

}  // namespace

void amx_linear(const LinearCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads) {
  const Reads* read = call.in_index == nullptr ? nullptr : &reads;
  const std::int64_t panels = ceil_div(call.weight.n, kPanelWidth), pairs = ceil_div(call.m, kPairRows);
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, std::max(pairs, panels)));
  // As in linear.cpp: whichever leaves the fullest thread less to do; at a tie rows, which share nothing.
  const bool by_rows = ceil_div(pairs, threads) * panels <= ceil_div(panels, threads) * pairs;
  parallel(threads, [&](int i, int count) {
    const Range rows = by_rows ? block_of({0, call.m}, i, count) : Range{0, call.m};
    const Range share_of_panels = by_rows ? Range{0, panels} : share(panels, i, count);
    if (rows.size() > 0 && share_of_panels.size() > 0)
      run(call, kernels, windows, read, rows, share_of_panels);
  });
}

void amx_mlp(const MlpCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads,
             std::int64_t begin, std::int64_t end) {
  Workspace& memory = workspace();
  const AmxSession session;
  const Range rows{begin, end};
  const std::int64_t element = element_bytes(call.element);
  const bool gated = call.gate.data != nullptr;
  const AmxLayer up = amx_layer(call.up, gated ? Activation::none : call.activation, memory.bias);
  const AmxLayer gate = gated ? amx_layer(call.gate, call.activation, memory.gate_bias) : AmxLayer{};
  const AmxLayer down = amx_layer(call.down, Activation::none, memory.down_bias);
  const Range up_panels{0, ceil_div(up.n, kPanelWidth)}, down_panels{0, ceil_div(down.n, kPanelWidth)};
  const Input input{call.x, call.x_stride, call.in_features,
                    up.k,   call.element,  call.in_index == nullptr ? nullptr : &reads};
  // Both sides of the intermediate in L2; where that leaves too few rows to hide the weights (k + n = 15,000
  // gives 32), `up` and `down` each go through the block in parts that fit them.
  const std::int64_t fit = amx_block_rows(up.k + up.n);
  const std::int64_t blocks = ceil_div(rows.size(), std::max<std::int64_t>(fit, 4 * kPairRows));
  for (std::int64_t b = 0; b < blocks; ++b) {
    const Range block = block_of(rows, b, blocks);
    if (block.size() == 0) continue;
    const AmxRows x = take_tiles(input, kernels, block, memory);
    std::uint16_t* between = memory.between.get<std::uint16_t>(amx_values(block.size(), up.n));
    const auto parts = [&](const AmxRows& all, std::int64_t k, const auto& multiply) {
      const std::int64_t count = ceil_div(all.rows, amx_block_rows(k));
      for (std::int64_t i = 0; i < count; ++i) {
        const Range part = block_of({0, all.rows}, i, count);
        multiply(AmxRows{all.tiles + amx_values(part.begin, k), part.size()}, part.begin,
                 i + 1 < count || b + 1 < blocks);
      }
    };
    parts(x, up.k, [&](const AmxRows& part, std::int64_t row, bool again) {
      AmxTarget target;
      target.tiles = between + amx_values(row, up.n);
      target.k_steps = amx_steps(up.n);
      amx_multiply(part, up, gated ? &gate : nullptr, up_panels, target, again);
    });
    parts({between, block.size()}, down.k, [&](const AmxRows& part, std::int64_t row, bool again) {
      AmxTarget target;
      target.windows = &windows;
      target.element = call.element;
      target.y = static_cast<char*>(call.y) + (block.begin + row) * call.y_stride * element;
      target.y_stride = call.y_stride;
      if (call.residual != nullptr)
        target.residual =
            static_cast<const char*>(call.residual) + (block.begin + row) * call.residual_stride * element;
      target.residual_stride = call.residual_stride;
      amx_multiply(part, down, nullptr, down_panels, target, again);
    });
  }
}

}  // namespace prunekern
