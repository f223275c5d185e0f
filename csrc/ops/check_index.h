// Checks of indices.
#pragma once

#include <cstdint>

namespace prunekern {

// Throws std::invalid_argument, in the name of `op`, unless index[0..count) is strictly ascending within
// [0, size).
void check_index(const char* op, const char* name, const std::int64_t* index, std::int64_t count,
                 std::int64_t size);

}  // namespace prunekern
