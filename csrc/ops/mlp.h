// compact_mlp with a table of kernels already chosen.
#pragma once

#include "kernels/kernel.h"
#include "prunekern/mlp.h"

namespace prunekern {

void compact_mlp(const Kernels& kernels, const MlpCall& call);

}  // namespace prunekern
