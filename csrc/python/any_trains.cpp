// prunekern._C: whether a module or one inside it is in training mode.
#include "python/eager.h"
#include "python/module.h"

namespace prunekern {
namespace {

// What an object's own dict has under a name, borrowed; null where there is none.
PyObject* own(PyObject* object, PyObject* name) {
  PyObject* dict = PyObject_GenericGetDict(object, nullptr);
  if (dict == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  PyObject* value = PyDict_GetItemWithError(dict, name);
  Py_DECREF(dict);  // the object has it, too
  return value;
}

// 1, 0, or -1 for a Python error. What keeps its mode or its modules elsewhere than in plain attributes, as a
// scripted module does, counts as training: whoever asks then sets the mode the long way.
int trains(PyObject* module) {
  static PyObject* const training = PyUnicode_InternFromString("training");
  static PyObject* const modules = PyUnicode_InternFromString("_modules");
  if (training == nullptr || modules == nullptr) return -1;
  if (module == Py_None) return 0;
  PyObject* mode = own(module, training);
  PyObject* inside = mode == Py_False ? own(module, modules) : nullptr;
  if (inside == nullptr || !PyDict_Check(inside)) return PyErr_Occurred() != nullptr ? -1 : 1;
  if (Py_EnterRecursiveCall(" while asking modules for their mode") != 0) return -1;
  int found = 0;
  Py_ssize_t at = 0;
  PyObject* value = nullptr;
  while (found == 0 && PyDict_Next(inside, &at, nullptr, &value) != 0) found = trains(value);
  Py_LeaveRecursiveCall();
  return found;
}

PyObject* any_trains(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 1) {
    PyErr_Format(PyExc_TypeError, "any_trains takes 1 argument (got %zd)", count);
    return nullptr;
  }
  const int found = trains(args[0]);
  return found < 0 ? nullptr : PyBool_FromLong(found);
}

}  // namespace

void add_any_trains(pybind11::module_& m) {
  eager::add_function<any_trains>(
      m, "any_trains", "any_trains(module) -> whether it or a module inside it is in training mode.");
}

}  // namespace prunekern
