// What the functions that take addresses have in common. Addresses are integers, 0 means not given; whoever
// calls keeps the memory alive.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "prunekern/linear.h"

namespace prunekern {

using Address = std::uintptr_t;
using Strides = std::pair<std::int64_t, std::int64_t>;  // of a sequence, of a token
using Firsts = std::vector<std::int64_t>;               // [heads + 1]: where each head begins

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// fp32, bf16, int8; fp32, bf16.
WeightType parse_type(const std::string& text);
Element parse_element(const std::string& text);

}  // namespace prunekern
