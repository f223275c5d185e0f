// compact_linear: checks, what to plan once for all threads, and which thread does what.
#include "prunekern/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "amx_linear.h"
#include "blocks.h"
#include "kernels/kernel.h"
#include "loops.h"
#include "packed.h"
#include "parallel.h"
#include "plan.h"

namespace prunekern {
namespace {

// No output channel is left: nothing but the residual.
void fill(const LinearCall& call) {
  const std::int64_t element = element_bytes(call.element);
  const std::size_t bytes = static_cast<std::size_t>(call.n_out * element);
  for (std::int64_t r = 0; r < call.m; ++r) {
    char* y = static_cast<char*>(call.y) + r * call.y_stride * element;
    if (call.residual == nullptr)
      std::memset(y, 0, bytes);  // zero in both types
    else
      std::memmove(y, static_cast<const char*>(call.residual) + r * call.residual_stride * element, bytes);
  }
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("compact_linear: " + message);
}

void check(const LinearCall& call) {
  require(call.m >= 0 && call.in_features >= 0 && call.weight.k >= 0 && call.weight.n >= 0 && call.n_out >= 0,
          "sizes must not be negative");
  require(call.in_index != nullptr || call.weight.k == call.in_features || call.weight.k == 0,
          "the weight reads " + std::to_string(call.weight.k) + " inputs, x has " +
              std::to_string(call.in_features));
  require(call.out_index != nullptr || call.weight.n == call.n_out || call.weight.n == 0,
          "the weight makes " + std::to_string(call.weight.n) + " outputs, n_out is " +
              std::to_string(call.n_out));
  require(call.x_stride >= 0 && call.residual_stride >= 0 && call.y_stride >= call.n_out, "bad row stride");
  require(call.weight.type != WeightType::int8 || call.weight.scale != nullptr || call.weight.n == 0,
          "an int8 weight needs its scale (got none)");
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
  if (call.in_index != nullptr)
    check_index("compact_linear", "in_index", call.in_index, call.weight.k, call.in_features);
  if (call.out_index != nullptr)
    check_index("compact_linear", "out_index", call.out_index, call.weight.n, call.n_out);
}

}  // namespace

void compact_linear(Isa isa, const LinearCall& call) {
  const Kernels& kernel = kernels(isa);
  check(call);
  if (call.m == 0 || call.n_out == 0) return;
  if (call.weight.n == 0) return fill(call);
  static thread_local Windows kept_windows;
  Windows& windows = kept_windows;
  plan_windows(kernel, call.out_index, call.weight.n, call.n_out, windows);
  static thread_local Reads kept_reads;
  Reads& reads = kept_reads;
  if (call.in_index != nullptr) plan_reads(kernel, call.in_index, call.weight.k, call.in_features, reads);
  if (amx_takes(isa, call.weight.type, call.m)) return amx_linear(call, kernel, windows, reads);
  const std::int64_t panels = ceil_div(call.weight.n, kernel.width);
  // Rows or panels, whichever leaves the fullest thread less to do; at a tie rows, which share nothing.
  const std::int64_t row_tiles = ceil_div(call.m, kernel.rows);
  const std::int64_t by_rows = ceil_div(row_tiles, call.threads) * panels;
  const std::int64_t by_panels = ceil_div(panels, call.threads) * row_tiles;
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, std::max(row_tiles, panels)));
  parallel(threads, [&](int i, int count) {
    if (by_rows <= by_panels)
      run_loops(call, kernel, windows, reads, share(call.m, i, count), {0, panels});
    else
      run_loops(call, kernel, windows, reads, {0, call.m}, share(panels, i, count));
  });
}

}  // namespace prunekern
