// disentangled_attention: checks, and which thread takes which head.
#include "prunekern/disentangled_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/table.h"
#include "loops/disentangled_head.h"
#include "loops/threads.h"

namespace prunekern {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("disentangled_attention: " + message);
}

void check_first(const char* name, const std::int64_t* first, std::int64_t heads) {
  require(first != nullptr && first[0] == 0, std::string(name) + " must start with 0");
  for (std::int64_t h = 0; h < heads; ++h)
    if (first[h] > first[h + 1])
      require(false, std::string(name) + " must not descend (got " + std::to_string(first[h + 1]) +
                         " after " + std::to_string(first[h]) + " at position " + std::to_string(h + 1) +
                         ")");
}

void check(const DisentangledCall& call) {
  require(call.batch >= 0 && call.tokens >= 0 && call.heads >= 0, "sizes must not be negative");
  check_first("qk_first", call.qk_first, call.heads);
  check_first("v_first", call.v_first, call.heads);
  require(std::isfinite(call.scale), "scale must be finite (got " + std::to_string(call.scale) + ")");
  require(call.y_stride >= call.v_first[call.heads], "bad row stride of y");
  require(call.threads >= 1, "threads must be at least 1 (got " + std::to_string(call.threads) + ")");
}

}  // namespace

void disentangled_attention(Isa isa, const DisentangledCall& call) {
  const Kernels& kernel = kernels(isa);
  check(call);
  const std::int64_t heads = call.batch * call.heads;
  if (heads == 0 || call.tokens == 0) return;
  // Heads differ in width: threads take them one by one. Where there are few, their queries are divided, at
  // the price of packing keys, values and positions once for each part.
  const std::int64_t tiles = ceil_div(call.tokens, kernel.rows);
  const std::int64_t needed = ceil_div(call.tokens, most_queries(kernel));
  const std::int64_t wanted = call.threads == 1 ? 1 : 4 * call.threads / heads;
  const std::int64_t parts = std::clamp<std::int64_t>(wanted, needed, std::max(tiles, needed));
  const std::int64_t items = heads * parts;
  std::atomic<std::int64_t> taken{0};
  parallel(static_cast<int>(std::min<std::int64_t>(call.threads, items)), [&](int, int) {
    for (std::int64_t i = taken++; i < items; i = taken++)
      run_queries(call, kernel, i / parts / call.heads, i / parts % call.heads,
                  share(call.tokens, i % parts, parts));
  });
}

}  // namespace prunekern
