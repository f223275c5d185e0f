#include "python/tensors.h"

namespace prunekern::eager {
namespace {

int (*tensor_from_py_object)(void*, dlpack::Tensor*) = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *watched_type = nullptr, *new_empty = nullptr,
         *is_neg = nullptr;

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
  if (type != tensor_type && type != parameter_type && type != watched_type) return false;
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

bool is(const dlpack::Tensor& tensor, std::uint8_t code, std::uint8_t bits) {
  return tensor.code == code && tensor.bits == bits;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  std::int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

bool view_index(PyObject* object, const std::int64_t*& index, std::int64_t& length) {
  dlpack::Tensor tensor;
  if (!view(object, tensor) || !is(tensor, dlpack::kInt, 64) || tensor.ndim != 1 || !is_contiguous(tensor))
    return false;
  index = static_cast<const std::int64_t*>(tensor.data);
  length = tensor.shape[0];
  return length > 0;
}

bool view_vector(PyObject* object, std::int64_t length, const float*& data) {
  dlpack::Tensor tensor;
  if (!view(object, tensor) || !is(tensor, dlpack::kFloat, 32) || tensor.ndim != 1 ||
      tensor.shape[0] != length || !is_contiguous(tensor))
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

bool use_tensor_types(PyObject* tensor, PyObject* parameter, PyObject* watched) {
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {  // torch < 2.10
    PyErr_Clear();
    return false;
  }
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_py_object == nullptr) return false;
  new_empty = PyUnicode_InternFromString("new_empty");
  is_neg = PyUnicode_InternFromString("is_neg");
  if (new_empty == nullptr || is_neg == nullptr) return false;
  tensor_type = Py_NewRef(tensor);
  parameter_type = Py_NewRef(parameter);
  watched_type = Py_NewRef(watched);
  tensor_from_py_object = api->tensor_from_py_object;
  return true;
}

}  // namespace prunekern::eager
