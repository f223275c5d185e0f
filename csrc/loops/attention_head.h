// The loops of attention: one head of one sequence.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"
#include "loops/shares.h"
#include "prunekern/attention.h"

namespace prunekern {

// One item of work: some queries of one key/value head of one sequence, in all query heads that share it.
struct Item {
  std::int64_t sequence, head;
  Range queries;
};

// next: what this thread will probably do after it, or null.
void run_item(const AttentionCall& call, const Kernels& kernel, const Item& item, const Item* next);

}  // namespace prunekern
