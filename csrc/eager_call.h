// The short way from an eager torch call into the core; see eager_call.cpp.
#pragma once

#include <Python.h>

namespace prunekern {

// Adds `use_tensor_types`, `call`, `call_mlp` and `call_attention` to the module; returns false with a Python
// error set.
bool add_eager_call(PyObject* module);

PyObject* eager_mlp(PyObject*, PyObject* const* args, Py_ssize_t count);        // eager_mlp.cpp
PyObject* eager_attention(PyObject*, PyObject* const* args, Py_ssize_t count);  // eager_attention.cpp

}  // namespace prunekern
