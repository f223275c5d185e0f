// The parts of prunekern._C. Addresses are integers, 0 means not given; whoever calls keeps the memory alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "prunekern/linear.h"

namespace prunekern {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// fp32, bf16, int8; fp32, bf16.
WeightType parse_type(const std::string& text);
Element parse_element(const std::string& text);

void bind_linear(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_mlp(pybind11::module_& m);

}  // namespace prunekern
