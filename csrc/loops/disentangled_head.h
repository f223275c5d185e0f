// The loops of attention by content and position: one head of one sequence.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"
#include "loops/shares.h"
#include "prunekern/disentangled_attention.h"

namespace prunekern {

// Queries of one item: what positions say of them to all keys stays in L2.
inline std::int64_t most_queries(const Kernels& kernel) { return 18 * kernel.rows; }

// Some queries, at most most_queries, of one head of one sequence.
void run_queries(const DisentangledCall& call, const Kernels& kernel, std::int64_t sequence,
                 std::int64_t head, Range queries);

}  // namespace prunekern
