// Which keys a mask, a diagonal or a window leaves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "loops/shares.h"
#include "prunekern/attention.h"

namespace prunekern {

// Keys that the mask of one sequence allows.
inline void allowed_keys(const AttentionCall& call, std::int64_t sequence, std::vector<std::int64_t>& keys) {
  keys.clear();
  const bool* mask = call.key_mask == nullptr ? nullptr : call.key_mask + sequence * call.key_mask_stride;
  for (std::int64_t i = 0; i < call.keys; ++i)
    if (mask == nullptr || mask[i]) keys.push_back(i);
}

// Which of the allowed keys each query may read.
inline void find_seen(const AttentionCall& call, const std::vector<std::int64_t>& keys,
                      std::vector<Range>& seen) {
  auto before = [&](std::int64_t key) {
    return std::lower_bound(keys.begin(), keys.end(), key) - keys.begin();
  };
  seen.resize(call.queries);
  for (std::int64_t i = 0; i < call.queries; ++i)
    seen[i] = call.causal ? Range{0, before(call.keys - call.queries + i + 1)}
                          : Range{before(i - call.window), before(i + call.window + 1)};
}

}  // namespace prunekern
