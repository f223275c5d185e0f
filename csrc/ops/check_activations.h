// Whether what is to become of x goes with a weight.
#pragma once

#include "prunekern/linear.h"

namespace prunekern {

// Throws std::invalid_argument where int8 is asked for and the weight is none, or has too many inputs.
void check_activations(const char* op, const Packed& weight);

}  // namespace prunekern
