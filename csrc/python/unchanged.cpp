// prunekern._C: whether modules and tensors still are what something was made of.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "prunekern/fingerprint.h"
#include "python/addresses.h"
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

// What one `Seen` is in the flat tuple (prunekern/ops/seen.py).
enum Part { kTensor, kType, kAddress, kVersion, kReads, kCount, kLook, kFingerprint, kParts };

// All but the values: whether the tensor is the one that was seen, and its matrix.
bool is_same(PyObject* const* seen, MatrixView& matrix) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(seen[kTensor])) != seen[kType]) return false;
  dlpack::Tensor tensor;
  if (!eager::view(seen[kTensor], tensor) || tensor.ndim > 2 ||
      reinterpret_cast<long long>(tensor.data) != PyLong_AsLongLong(seen[kAddress]))
    return false;
  static PyObject* const name = PyUnicode_InternFromString("_version");
  if (name == nullptr) return false;
  const long long version = PyLong_AsLongLong(seen[kVersion]);
  if (version >= 0 && number(PyObject_GetAttr(seen[kTensor], name)) != version) return false;
  if (PyList_CheckExact(seen[kReads]) && PyList_GET_SIZE(seen[kReads]) == 1 &&
      PyLong_AsLongLong(PyList_GET_ITEM(seen[kReads], 0)) != PyLong_AsLongLong(seen[kCount]))
    return false;
  const int last = tensor.ndim - 1;
  matrix.data = tensor.data;
  matrix.rows = last == 0 ? 1 : tensor.shape[0];
  matrix.row_stride = last == 0 ? 0 : tensor.strides[0];
  matrix.columns = tensor.shape[last];
  matrix.column_stride = tensor.strides[last];
  matrix.bytes = tensor.bits / 8;
  return true;
}

Look look_of(PyObject* const* seen) { return static_cast<Look>(PyLong_AsLong(seen[kLook])); }

// What an entry asks lies in memory, cold and scattered: the tuple's objects, what a tensor's object points
// to, the values, a page from one another. Asked one after the other, each would be waited for; they
// are drawn while entries before them are asked.
void draw_objects(PyObject* const* seen) {
  for (int part = 0; part < kParts; ++part) __builtin_prefetch(seen[part]);
}

void draw_tensor(PyObject* const* seen) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(seen[kTensor])) != seen[kType]) return;
  // Its C++ half: what its object points to first. Only drawn, never read.
  std::uintptr_t words[3];
  __builtin_memcpy(words, seen[kTensor], sizeof(words));
  for (std::uintptr_t line = 0; line < 4; ++line)
    __builtin_prefetch(reinterpret_cast<const void*>(words[2] + 64 * line));
  if (PyList_CheckExact(seen[kReads])) __builtin_prefetch(PySequence_Fast_ITEMS(seen[kReads]));
}

bool all_hold(PyObject* const* seen, Py_ssize_t count) {
  constexpr Py_ssize_t kValues = 3, kTensors = 8, kObjects = 16;  // entries ahead
  MatrixView drawn[kValues];
  for (Py_ssize_t i = 0; i < std::min(kObjects, count); ++i) draw_objects(seen + i * kParts);
  for (Py_ssize_t i = 0; i < std::min(kTensors, count); ++i) draw_tensor(seen + i * kParts);
  for (Py_ssize_t i = 0; i < count + kValues; ++i) {
    if (i >= kValues) {
      PyObject* const* entry = seen + (i - kValues) * kParts;
      const auto now = static_cast<long long>(fingerprint(drawn[i % kValues], look_of(entry)));
      if (now != PyLong_AsLongLong(entry[kFingerprint])) return false;
    }
    if (i + kObjects < count) draw_objects(seen + (i + kObjects) * kParts);
    if (i + kTensors < count) draw_tensor(seen + (i + kTensors) * kParts);
    if (i >= count) continue;
    if (!is_same(seen + i * kParts, drawn[i % kValues])) return false;
    draw_fingerprint(drawn[i % kValues], look_of(seen + i * kParts));
  }
  return true;
}

PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
      !PyTuple_CheckExact(args[2]) || PyTuple_GET_SIZE(args[0]) % 3 != 0 ||
      PyTuple_GET_SIZE(args[2]) % kParts != 0) {
    PyErr_Format(PyExc_TypeError, "unchanged takes 3 tuples, the first of triples, the last of %d each",
                 static_cast<int>(kParts));
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
  const bool same = all_hold(PySequence_Fast_ITEMS(args[2]), PyTuple_GET_SIZE(args[2]) / kParts);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (!same) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
}

std::int64_t fingerprint_at(Address data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                            std::int64_t column_stride, int bytes, int look) {
  if (look < 0 || look > static_cast<int>(Look::all))
    throw std::invalid_argument("fingerprint: look must be 0 (few), 1 (lines) or 2 (all) (got " +
                                std::to_string(look) + ")");
  const MatrixView matrix{at<const void>(data), rows, columns, row_stride, column_stride, bytes};
  return static_cast<std::int64_t>(fingerprint(matrix, static_cast<Look>(look)));
}

}  // namespace

void add_unchanged(pybind11::module_& m) {
  eager::add_function<unchanged>(m, "unchanged",
                                 "unchanged((dict, key, value, ...), (dict, ...), (tensor, type, address, "
                                 "version, reads, count, look, fingerprint, ...)) -> whether each value "
                                 "still is what its dict has (None: or nothing), each dict is empty, and "
                                 "each tensor is as prunekern/ops/seen.py saw it.");
  using pybind11::arg;
  m.def("fingerprint", &fingerprint_at, arg("data"), arg("rows"), arg("columns"), arg("row_stride"),
        arg("column_stride"), arg("bytes"), arg("look"), "See prunekern/fingerprint.h; strides in values.");
}

}  // namespace prunekern
