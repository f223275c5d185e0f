#include "python/arguments.h"

#include "loops/panels.h"

namespace prunekern::eager {

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

bool read_weight(PyObject* packed, PyObject* scale, PyObject* bias, PyObject* activations, std::int64_t n,
                 std::int64_t k, Packed& weight) {
  static const std::int64_t width = panel_width(active_isa());
  dlpack::Tensor tensor;
  if (n <= 0 || k <= 0 || !view(packed, tensor) || !is_contiguous(tensor)) return false;
  if (tensor.ndim < 3 || tensor.shape[0] != ceil_div(n, width)) return false;
  if (is(tensor, dlpack::kFloat, 32))
    weight.type = WeightType::fp32;
  else if (is(tensor, dlpack::kBfloat, 16))
    weight.type = WeightType::bf16;
  else if (is(tensor, dlpack::kInt, 8))
    weight.type = WeightType::int8;
  else if (is(tensor, dlpack::kUint, 8))
    weight.type = WeightType::int4;
  else
    return false;
  const std::int64_t together = layout(weight.type).side_by_side;
  if (tensor.shape[1] != padded_k(weight.type, k) / together) return false;
  if (weight.type == WeightType::int4) {  // whole groups, as bytes
    if (tensor.ndim != 3 || tensor.shape[2] != inputs_bytes(weight.type, width, together)) return false;
  } else {
    if (tensor.shape[2] != width) return false;
    if (together == 1 ? tensor.ndim != 3 : tensor.ndim != 4 || tensor.shape[3] != together) return false;
  }
  std::int64_t of_x;
  if (!to_int(activations, of_x) || of_x < 0 || of_x > static_cast<int>(Activations::int8)) return false;
  weight.activations = static_cast<Activations>(of_x);
  if (layout(weight.type).is_scaled != (scale != Py_None)) return false;
  if (scale != Py_None && !view_vector(scale, n, weight.scale)) return false;
  if (bias != Py_None && !view_vector(bias, n, weight.bias)) return false;
  weight.n = n;
  weight.k = k;
  weight.data = tensor.data;
  return true;
}

bool read_index(PyObject* object, const std::int64_t*& index, std::int64_t& length) {
  return object == Py_None || view_index(object, index, length);
}

bool read_firsts(PyObject* object, std::vector<std::int64_t>& firsts) {
  if (!PyTuple_CheckExact(object)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(object);
  firsts.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!to_int(PyTuple_GET_ITEM(object, i), firsts[i])) return false;
  return count > 0 && firsts.front() == 0;
}

bool read_firsts(PyObject* object, std::int64_t last, std::vector<std::int64_t>& firsts) {
  return read_firsts(object, firsts) && firsts.back() == last;
}

bool read_key_mask(PyObject* object, std::int64_t batch, std::int64_t keys, const bool*& mask,
                   std::int64_t& stride) {
  if (object == Py_None) return true;
  dlpack::Tensor tensor;
  if (!view(object, tensor) || tensor.code != dlpack::kBool || tensor.bits != 8 || tensor.ndim != 2)
    return false;
  if (tensor.shape[0] != batch || tensor.shape[1] != keys) return false;
  if (tensor.shape[1] > 1 && tensor.strides[1] != 1) return false;
  mask = static_cast<const bool*>(tensor.data);
  stride = tensor.strides[0];
  return true;
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
  if (!to_int(object, number) || number < 0 || number > static_cast<int>(Activation::quick_gelu))
    return false;
  activation = static_cast<Activation>(number);
  return true;
}

bool read_threads(PyObject* object, int& threads) {
  std::int64_t count;
  if (!to_int(object, count) || count < 1 || count > 1 << 16) return false;
  threads = static_cast<int>(count);
  return true;
}

}  // namespace prunekern::eager
