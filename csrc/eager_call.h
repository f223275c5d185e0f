// The short way from an eager torch call into the core; see eager_call.cpp.
#pragma once

#include <Python.h>

namespace prunekern {

// Adds `use_tensor_types`, `call` and `call_mlp` to the module; returns false with a Python error set.
bool add_eager_call(PyObject* module);

PyObject* eager_mlp(PyObject*, PyObject* const* args, Py_ssize_t count);  // eager_mlp.cpp

}  // namespace prunekern
