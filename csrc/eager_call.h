// The short way from an eager torch call into the core; see eager_call.cpp.
#pragma once

#include <Python.h>

namespace prunekern {

// Adds `use_tensor_types`, `call`, `call_mlp`, `call_attention` and `call_rotary` to the module; returns
// false with a Python error set.
bool add_eager_call(PyObject* module);

PyObject* eager_mlp(PyObject*, PyObject* const* args, Py_ssize_t count);        // eager_mlp.cpp
PyObject* eager_attention(PyObject*, PyObject* const* args, Py_ssize_t count);  // eager_attention.cpp
PyObject* eager_rotary(PyObject*, PyObject* const* args, Py_ssize_t count);     // eager_rotary.cpp

}  // namespace prunekern
