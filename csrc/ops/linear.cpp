// compact_linear: checks, what is found once for all threads, and which thread does what.
#include "ops/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/table.h"
#include "loops/linear.h"
#include "loops/panels.h"
#include "loops/products.h"
#include "loops/threads.h"
#include "ops/check_activations.h"
#include "ops/check_index.h"

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
  require(!layout(call.weight.type).is_scaled || call.weight.scale != nullptr || call.weight.n == 0,
          std::string("an ") + name(call.weight.type) + " weight needs its scale (got none)");
  check_activations("compact_linear", call.weight);
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
  if (call.in_index != nullptr)
    check_index("compact_linear", "in_index", call.in_index, call.weight.k, call.in_features);
  if (call.out_index != nullptr)
    check_index("compact_linear", "out_index", call.out_index, call.weight.n, call.n_out);
}

}  // namespace

void compact_linear(const Kernels& kernels, const LinearCall& call) {
  check(call);
  if (call.m == 0 || call.n_out == 0) return;
  if (call.weight.n == 0) return fill(call);
  static thread_local Windows kept_windows;
  Windows& windows = kept_windows;
  make_windows(kernels, call.out_index, call.weight.n, call.n_out, windows);
  static thread_local Reads kept_reads;
  Reads& reads = kept_reads;
  if (call.in_index != nullptr) make_reads(kernels, call.in_index, call.weight.k, call.in_features, reads);
  const Linear linear{call, kernels, windows, reads};
  const Product* product = product_for(kernels, call.weight, call.element, call.m);

  // Rows or panels, whichever leaves the fullest thread less to do; at a tie rows, which share nothing.
  const std::int64_t group = product == nullptr ? kernels.rows : group_rows(*product);
  const std::int64_t groups = ceil_div(call.m, group), panels = ceil_div(call.weight.n, kernels.width);
  const bool by_rows = ceil_div(groups, call.threads) * panels <= ceil_div(panels, call.threads) * groups;
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, std::max(groups, panels)));
  parallel(threads, [&](int i, int count) {
    const Range all{0, call.m};
    const Range panels_here = by_rows ? Range{0, panels} : share(panels, i, count);
    if (product == nullptr) return fp32_linear(linear, by_rows ? share(call.m, i, count) : all, panels_here);
    const Range rows = by_rows ? share_groups(all, group, i, count) : all;
    if (rows.size() > 0 && panels_here.size() > 0) prepared_linear(*product, linear, rows, panels_here);
  });
}

void compact_linear(Isa isa, const LinearCall& call) { compact_linear(kernels(isa), call); }

}  // namespace prunekern
