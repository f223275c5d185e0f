// The table of kernels for this CPU.
#pragma once

#include "kernels/kernel.h"

namespace prunekern {

// The table of an instruction set, with every row that this CPU has besides; throws std::runtime_error where
// this CPU cannot run the set.
const Kernels& kernels(Isa isa);

}  // namespace prunekern
