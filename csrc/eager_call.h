// The short way from an eager torch call into the core; see eager_call.cpp.
#pragma once

#include <Python.h>

namespace prunekern {

// Adds `use_tensor_types` and `call` to the module; returns false with a Python error set.
bool add_eager_call(PyObject* module);

}  // namespace prunekern
