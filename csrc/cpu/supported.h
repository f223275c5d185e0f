// Whether this CPU can run an instruction set.
#pragma once

#include <string>

#include "prunekern/isa.h"

namespace prunekern {

bool is_supported(Isa isa);

// The names of supported_isas(), for people.
std::string supported_names();

}  // namespace prunekern
