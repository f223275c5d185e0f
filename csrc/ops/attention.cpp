// compact_attention: checks, and which thread takes which head.
#include "prunekern/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/table.h"
#include "loops/attention_head.h"
#include "loops/caches.h"
#include "loops/threads.h"

namespace prunekern {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("compact_attention: " + message);
}

void check_first(const char* name, const std::int64_t* first, std::int64_t heads) {
  require(first != nullptr && first[0] == 0, std::string(name) + " must start with 0");
  for (std::int64_t h = 0; h < heads; ++h)
    if (first[h] > first[h + 1])
      require(false, std::string(name) + " must not descend (got " + std::to_string(first[h + 1]) +
                         " after " + std::to_string(first[h]) + " at position " + std::to_string(h + 1) +
                         ")");
}

void check(const AttentionCall& call) {
  require(call.batch >= 0 && call.queries >= 0 && call.keys >= 0 && call.heads >= 0,
          "sizes must not be negative");
  check_first("qk_first", call.qk_first, call.heads);
  check_first("v_first", call.v_first, call.heads);
  require(std::isfinite(call.scale), "scale must be finite (got " + std::to_string(call.scale) + ")");
  require(call.shared_by >= 1, "shared_by must be at least 1 (got " + std::to_string(call.shared_by) + ")");
  require(call.bias == nullptr || (call.shared_by == 1 && call.bias_head != nullptr),
          "a bias needs bias_head, and shared_by of 1");
  require(!call.causal || call.queries <= call.keys, "queries must be at most keys where causal");
  require(call.window < 0 || (!call.causal && call.queries == call.keys),
          "queries must be as many as keys, and not causal, with a window");
  require(call.y_stride >= call.shared_by * call.v_first[call.heads], "bad row stride of y");
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
}

}  // namespace

void compact_attention(Isa isa, const AttentionCall& call) {
  const Kernels& kernel = kernels(isa);
  check(call);
  const std::int64_t pairs = call.batch * call.heads;
  if (pairs == 0 || call.queries == 0) return;
  // Heads differ in width: threads take them one by one. Where there are few, their queries are divided, at
  // the price of packing keys and values once for each part.
  const std::int64_t tiles = ceil_div(call.queries, kernel.rows);
  const std::int64_t parts =
      std::clamp<std::int64_t>(call.threads == 1 ? 1 : 4 * call.threads / pairs, 1, tiles);
  const std::int64_t items = pairs * parts;
  const int threads = static_cast<int>(std::min<std::int64_t>(call.threads, items));
  auto item = [&](std::int64_t i) {
    return Item{i / parts / call.heads, i / parts % call.heads, share(call.queries, i % parts, parts)};
  };
  const std::int64_t floats = (call.shared_by * call.queries + call.keys) * call.qk_first[call.heads] +
                              call.keys * call.v_first[call.heads];
  const bool is_large = call.batch * floats * 4 > l2_bytes();
  std::atomic<std::int64_t> taken{0};
  parallel(threads, [&](int, int count) {
    for (std::int64_t i = taken++; i < items; i = taken++) {
      const Item next = item(i + count);
      run_item(call, kernel, item(i), (is_large || call.queries == 1) && i + count < items ? &next : nullptr);
    }
  });
}

}  // namespace prunekern
