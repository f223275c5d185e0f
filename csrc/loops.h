// The loops around the microkernels.
#pragma once

#include "blocks.h"
#include "kernels/kernel.h"
#include "plan.h"

namespace prunekern {

// One thread's share of a call: rows x panels of the result.
void run_loops(const LinearCall& call, const Kernels& kernels, const Windows& windows, const Reads& reads,
               Range rows, Range panels);

}  // namespace prunekern
