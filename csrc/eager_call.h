// The short way from an eager torch call into the core; see eager_call.cpp.
#pragma once

#include <Python.h>

namespace prunekern {

// Adds `use_tensor_types`, `call`, `call_mlp`, `call_attention`, `call_rotary`, `call_norm` and
// `call_decoder_block` to the module; returns false with a Python error set.
bool add_eager_call(PyObject* module);

// Each in the file of its name, but for the last.
PyObject* eager_mlp(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* eager_attention(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* eager_rotary(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* eager_norm(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* eager_decoder_block(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* eager_unchanged(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace prunekern
