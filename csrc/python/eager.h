// Eager calls: one C call checks all tensors of an ordinary call, allocates y and runs the core.
//
// The same in Python asks torch some thirty questions: 4 us where they are warm, 9 us between layers, when
// weights have just gone through the cache, against 70 us for a whole layer at one row. Asked through
// DLPack's exchange ABI they cost a tenth. Whatever is not ordinary (another dtype, device, type, shape,
// stride) gets None: Python then runs it another way, or says what is wrong with it. So there is no error
// message in here.
#pragma once

#include <pybind11/pybind11.h>

#include "python/arguments.h"
#include "python/tensors.h"

namespace prunekern::eager {

// Runs the core without the GIL; an exception becomes a Python error and drops y.
PyObject* finish(PyObject* y, void (*run)(void* call), void* call);

// An eager call is a class with
//   kName                what Python calls it
//   kArguments           how many it takes; args[0] is x, whose shape but the last and whose type y has
//   bool read(args)      everything but y from the arguments; false: not ordinary, or a Python error is set
//   x                    the tensor at args[0]
//   channels()           last size of y
//   write_to(void*)      where y lies
//   run()                the call of the core
template <class Call>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != Call::kArguments) {
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments (got %zd)", Call::kName,
                 static_cast<int>(Call::kArguments), count);
    return nullptr;
  }
  Call one;
  if (!ready() || !one.read(args)) {
    if (PyErr_Occurred() != nullptr) return nullptr;
    Py_RETURN_NONE;
  }
  void* data = nullptr;
  PyObject* y = allocate(args[0], one.x, one.channels(), data);
  if (y == nullptr || y == Py_None) return y;
  one.write_to(data);
  return finish(y, [](void* c) { static_cast<Call*>(c)->run(); }, &one);
}

// Adds a function that takes its arguments as they are, without pybind11's conversions.
using FastFunction = PyObject* (*)(PyObject*, PyObject* const* args, Py_ssize_t count);
template <FastFunction function>
void add_function(pybind11::module_& m, const char* name, const char* doc) {
  // By way of a function without arguments: gcc warns about the direct cast.
  static PyMethodDef methods[] = {
      {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

template <class Call>
void add_call(pybind11::module_& m, const char* doc) {
  add_function<call<Call>>(m, Call::kName, doc);
}

}  // namespace prunekern::eager
