// compact_linear with a table of kernels already chosen: what the other ops call.
#pragma once

#include "kernels/kernel.h"
#include "prunekern/linear.h"

namespace prunekern {

void compact_linear(const Kernels& kernels, const LinearCall& call);

}  // namespace prunekern
