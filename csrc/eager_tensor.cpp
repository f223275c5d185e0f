#include "eager_tensor.h"

#include <stdexcept>
#include <string>

namespace prunekern::eager {
namespace {

int (*tensor_from_py_object)(void*, dlpack::Tensor*) = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *new_empty = nullptr, *is_neg = nullptr;

bool is(const dlpack::Tensor& tensor, std::uint8_t code, std::uint8_t bits) {
  return tensor.code == code && tensor.bits == bits;
}

// Row-major without holes, by the strides of what has more than one element.
bool contiguous(const dlpack::Tensor& tensor) {
  std::int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

bool is_positive(PyObject* object) {
  PyObject* negative = PyObject_VectorcallMethod(is_neg, &object, 1, nullptr);
  if (negative == nullptr) PyErr_Clear();
  Py_XDECREF(negative);
  return negative == Py_False;
}

}  // namespace

bool ready() { return tensor_from_py_object != nullptr; }

bool view(PyObject* object, dlpack::Tensor& tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) return false;
  if (tensor_from_py_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  if (tensor.device_type != dlpack::kCpu || tensor.lanes != 1 || tensor.byte_offset != 0 || tensor.ndim < 1 ||
      tensor.ndim > kMaxDims)
    return false;
  if (tensor.data != nullptr) return true;
  for (int i = 0; i < tensor.ndim;
       ++i)  // elements without memory: a storage that was given up, or zeros not stored
    if (tensor.shape[i] == 0) return true;
  return false;
}

bool view_index(PyObject* object, const std::int64_t*& index, std::int64_t& length) {
  dlpack::Tensor tensor;
  if (!view(object, tensor) || !is(tensor, dlpack::kInt, 64) || tensor.ndim != 1 || !contiguous(tensor))
    return false;
  index = static_cast<const std::int64_t*>(tensor.data);
  length = tensor.shape[0];
  return length > 0;
}

bool view_vector(PyObject* object, std::int64_t length, const float*& data) {
  dlpack::Tensor tensor;
  if (!view(object, tensor) || !is(tensor, dlpack::kFloat, 32) || tensor.ndim != 1 ||
      tensor.shape[0] != length || !contiguous(tensor))
    return false;
  data = static_cast<const float*>(tensor.data);
  return is_positive(object);
}

bool view_input(PyObject* object, dlpack::Tensor& tensor, Element& element) {
  if (!view(object, tensor)) return false;
  if (is(tensor, dlpack::kFloat, 32))
    element = Element::fp32;
  else if (is(tensor, dlpack::kBfloat, 16))
    element = Element::bf16;
  else
    return false;
  return is_positive(object);
}

bool rows(const dlpack::Tensor& tensor, std::int64_t count, std::int64_t& stride) {
  const int last = tensor.ndim - 1;
  if (tensor.strides[last] != 1 && tensor.shape[last] != 1) return false;
  stride = tensor.shape[last];  // of a single row
  std::int64_t expected = -1;   // the stride that continues the rows seen so far
  for (int d = last - 1; d >= 0; --d) {
    if (tensor.shape[d] == 1) continue;
    if (expected < 0)
      stride = tensor.strides[d];
    else if (tensor.strides[d] != expected)
      return false;
    expected = tensor.strides[d] * tensor.shape[d];
  }
  return count >= 0 && stride >= 0;
}

std::int64_t count_rows(const dlpack::Tensor& tensor) {
  std::int64_t count = 1;
  for (int d = 0; d < tensor.ndim - 1; ++d) count *= tensor.shape[d];
  return count;
}

bool read_residual(PyObject* object, const dlpack::Tensor& x, Element element, std::int64_t m,
                   std::int64_t n_out, const void*& data, std::int64_t& stride) {
  if (object == Py_None) return true;
  dlpack::Tensor tensor;
  Element own;
  if (!view_input(object, tensor, own) || own != element || tensor.ndim != x.ndim) return false;
  for (int d = 0; d < x.ndim - 1; ++d)
    if (tensor.shape[d] != x.shape[d]) return false;
  data = tensor.data;
  return tensor.shape[x.ndim - 1] == n_out && rows(tensor, m, stride);
}

bool read_weight(PyObject* packed, PyObject* scale, PyObject* bias, std::int64_t n, std::int64_t k,
                 Packed& weight) {
  static const std::int64_t width = panel_width(active_isa());
  dlpack::Tensor tensor;
  if (n <= 0 || k <= 0 || !view(packed, tensor) || !contiguous(tensor)) return false;
  if (tensor.ndim < 3 || tensor.shape[0] != (n + width - 1) / width || tensor.shape[2] != width) return false;
  if (tensor.ndim == 4 && is(tensor, dlpack::kBfloat, 16)) {
    weight.type = WeightType::bf16;
    if (tensor.shape[1] != (k + 31) / 32 * 16 || tensor.shape[3] != 2) return false;
  } else {
    if (tensor.ndim != 3 || tensor.shape[1] != k) return false;
    if (is(tensor, dlpack::kFloat, 32))
      weight.type = WeightType::fp32;
    else if (is(tensor, dlpack::kInt, 8))
      weight.type = WeightType::int8;
    else
      return false;
  }
  if ((weight.type == WeightType::int8) != (scale != Py_None)) return false;
  if (scale != Py_None && !view_vector(scale, n, weight.scale)) return false;
  if (bias != Py_None && !view_vector(bias, n, weight.bias)) return false;
  weight.n = n;
  weight.k = k;
  weight.data = tensor.data;
  return true;
}

bool view_tokens(PyObject* object, dlpack::Tensor& tensor, const float*& data, std::int64_t& batch_stride,
                 std::int64_t& stride) {
  Element element;
  if (!view_input(object, tensor, element) || element != Element::fp32 || tensor.ndim != 3) return false;
  if (tensor.shape[2] > 1 && tensor.strides[2] != 1) return false;
  data = static_cast<const float*>(tensor.data);
  batch_stride = tensor.strides[0];
  stride = tensor.strides[1];
  return true;
}

bool read_firsts(PyObject* object, std::int64_t last, std::vector<std::int64_t>& firsts) {
  if (!PyTuple_CheckExact(object)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(object);
  firsts.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!to_int(PyTuple_GET_ITEM(object, i), firsts[i])) return false;
  return count > 0 && firsts.front() == 0 && firsts.back() == last;
}

bool to_int(PyObject* object, std::int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  return true;
}

bool to_float(PyObject* object, float& value) {
  if (!PyFloat_CheckExact(object)) return false;
  value = static_cast<float>(PyFloat_AS_DOUBLE(object));
  return true;
}

bool read_activation(PyObject* object, Activation& activation) {
  std::int64_t number;
  if (!to_int(object, number) || number < 0 || number > static_cast<int>(Activation::silu)) return false;
  activation = static_cast<Activation>(number);
  return true;
}

bool read_threads(PyObject* object, int& threads) {
  std::int64_t count;
  if (!to_int(object, count) || count < 1 || count > 1 << 16) return false;
  threads = static_cast<int>(count);
  return true;
}

// new_empty, because a default device or dtype must not reach y.
PyObject* allocate(PyObject* x_object, const dlpack::Tensor& x, std::int64_t n_out, void*& data) {
  PyObject* args[kMaxDims + 1] = {x_object};
  int count = 1;
  for (int d = 0; d < x.ndim; ++d) {
    args[count] = PyLong_FromLongLong(d < x.ndim - 1 ? x.shape[d] : n_out);
    if (args[count] == nullptr) break;
    ++count;
  }
  PyObject* y = nullptr;
  if (count == x.ndim + 1)
    y = PyObject_VectorcallMethod(new_empty, args, static_cast<std::size_t>(count), nullptr);
  for (int i = 1; i < count; ++i) Py_DECREF(args[i]);
  if (y == nullptr) return nullptr;
  dlpack::Tensor out;
  if (!view(y, out) || !is(out, x.code, x.bits)) {
    Py_DECREF(y);
    Py_RETURN_NONE;
  }
  data = out.data;
  return y;
}

PyObject* finish(PyObject* y, void (*run)(const void* call), const void* call) {
  PyObject* error_type = nullptr;
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    run(call);
  } catch (const std::invalid_argument& refused) {
    error_type = PyExc_ValueError;
    error = refused.what();
  } catch (const std::exception& failed) {
    error_type = PyExc_RuntimeError;
    error = failed.what();
  }
  Py_END_ALLOW_THREADS;
  if (error_type == nullptr) return y;
  Py_DECREF(y);
  PyErr_SetString(error_type, error.c_str());
  return nullptr;
}

PyObject* use_tensor_types(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_Format(PyExc_TypeError, "use_tensor_types takes 2 arguments (got %zd)", count);
    return nullptr;
  }
  PyObject* capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {  // torch < 2.10
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_py_object == nullptr) Py_RETURN_FALSE;
  new_empty = PyUnicode_InternFromString("new_empty");
  is_neg = PyUnicode_InternFromString("is_neg");
  if (new_empty == nullptr || is_neg == nullptr) return nullptr;
  tensor_type = Py_NewRef(args[0]);
  parameter_type = Py_NewRef(args[1]);
  tensor_from_py_object = api->tensor_from_py_object;
  Py_RETURN_TRUE;
}

}  // namespace prunekern::eager
