// prunekern._C.unchanged: whether a layer still is what the arguments of call_decoder_block were made of.
#include "python/eager.h"
#include "python/module.h"

namespace prunekern {
namespace {

// A number of an attribute or a method without arguments; -1 where there is none.
long long number(PyObject* value) {
  const long long got = value == nullptr ? -1 : PyLong_AsLongLong(value);
  Py_XDECREF(value);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return got;
}

PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
      !PyTuple_CheckExact(args[2]) || PyTuple_GET_SIZE(args[0]) % 3 != 0 ||
      PyTuple_GET_SIZE(args[2]) % 3 != 0) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes 3 tuples, the first and the last of triples");
    return nullptr;
  }
  // Some 60 dicts that lie in memory, cold: asked one after the other they take 14 us.
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3)
    __builtin_prefetch(PyTuple_GET_ITEM(args[0], i));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) __builtin_prefetch(PyTuple_GET_ITEM(args[1], i));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3) {
    PyObject* owner = PyTuple_GET_ITEM(args[0], i);
    if (PyDict_Check(owner)) __builtin_prefetch(reinterpret_cast<PyDictObject*>(owner)->ma_keys);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); i += 3) {
    PyObject* const* entry = PySequence_Fast_ITEMS(args[0]) + i;
    PyObject* value = PyDict_Check(entry[0]) ? PyDict_GetItemWithError(entry[0], entry[1]) : nullptr;
    if (value == nullptr && PyErr_Occurred() != nullptr) return nullptr;
    if ((value == nullptr ? Py_None : value) != entry[2]) Py_RETURN_FALSE;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) {
    PyObject* hooks = PyTuple_GET_ITEM(args[1], i);
    if (!PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) Py_RETURN_FALSE;
  }
  static PyObject* const name = PyUnicode_InternFromString("_version");
  if (name == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[2]); i += 3) {
    PyObject* const* entry = PySequence_Fast_ITEMS(args[2]) + i;
    const long long address = PyLong_AsLongLong(entry[1]), version = PyLong_AsLongLong(entry[2]);
    dlpack::Tensor tensor;
    if (!eager::view(entry[0], tensor) || reinterpret_cast<long long>(tensor.data) != address)
      Py_RETURN_FALSE;
    if (version >= 0 && number(PyObject_GetAttr(entry[0], name)) != version) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

}  // namespace

void add_unchanged(pybind11::module_& m) {
  eager::add_function<unchanged>(m, "unchanged",
                                 "unchanged((dict, key, value, ...), (dict, ...), (tensor, address, version, "
                                 "...)) -> whether each value "
                                 "still is what its dict has (None: or nothing), each dict is empty, and "
                                 "each tensor lies where it lay and "
                                 "was not changed in place (version -1: that is not counted).");
}

}  // namespace prunekern
