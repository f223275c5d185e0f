// prunekern._C.call: one C call checks all tensors of an ordinary eager call, allocates y and runs the
// kernel.
//
// The same in Python asks torch some thirty questions: 4 us where they are warm, 9 us between layers, when
// weights have just gone through the cache, against 70 us for a whole layer at one row. Asked through
// DLPack's exchange ABI they cost a tenth. Whatever is not ordinary (another dtype, device, type, shape,
// stride) gets None: Python then runs it another way, or says what is wrong with it. So there is no error
// message in here.
#include "eager_call.h"

#include <cstdint>
#include <stdexcept>

#include "dlpack_abi.h"
#include "prunekern/prunekern.h"

namespace prunekern {
namespace {

constexpr int kMaxDims = 8;

int (*tensor_from_py_object)(void*, dlpack::Tensor*) = nullptr;
PyObject *tensor_type = nullptr, *parameter_type = nullptr, *new_empty = nullptr, *is_neg = nullptr;

// A tensor of the exact types torch.Tensor or Parameter (no subclass: it may not be what it holds), on the
// CPU.
bool view(PyObject* object, std::uint8_t code, std::uint8_t bits, dlpack::Tensor& tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) return false;
  if (tensor_from_py_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor.device_type == dlpack::kCpu && tensor.code == code && tensor.bits == bits &&
         tensor.lanes == 1 && tensor.byte_offset == 0;
}

bool view_floats(PyObject* object, dlpack::Tensor& tensor) {
  return view(object, dlpack::kFloat, 32, tensor);
}

// The same for tensors of the caller. torch may keep a minus sign aside (x.conj().imag): DLPack does not
// tell.
bool view_input(PyObject* object, dlpack::Tensor& tensor) {
  if (!view_floats(object, tensor)) return false;
  PyObject* negative = PyObject_VectorcallMethod(is_neg, &object, 1, nullptr);
  if (negative == nullptr) PyErr_Clear();
  Py_XDECREF(negative);
  return negative == Py_False;
}

// [..., n] as rows of one stride, n and the count given; false where no single stride describes them.
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

bool is_vector(const dlpack::Tensor& tensor, std::int64_t length) {
  return tensor.ndim == 1 && tensor.shape[0] == length && (length <= 1 || tensor.strides[0] == 1);
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

// Everything but y from the arguments of `call`; false: not ordinary.
bool read_arguments(PyObject* const* args, LinearCall& call, dlpack::Tensor& x) {
  dlpack::Tensor packed, bias, in_index, out_index, residual;
  const std::int64_t width = panel_width(active_isa());
  std::int64_t activation, threads;
  if (!view_input(args[0], x) || !view_floats(args[1], packed)) return false;
  if (x.ndim < 1 || x.ndim > kMaxDims || packed.ndim != 3 || packed.shape[2] != width) return false;
  std::int64_t packed_stride;
  if (!rows(packed, packed.shape[0] * packed.shape[1], packed_stride) || packed_stride != width) return false;
  if (!to_int(args[5], call.n_out) || !to_int(args[6], activation) || !to_int(args[8], threads)) return false;
  if (call.n_out <= 0 || activation < 0 || activation > static_cast<int>(Activation::silu)) return false;
  call.activation = static_cast<Activation>(activation);
  call.threads = static_cast<int>(threads);

  call.m = 1;
  for (int d = 0; d < x.ndim - 1; ++d) call.m *= x.shape[d];
  call.in_features = x.shape[x.ndim - 1];
  call.weight.k = packed.shape[1];
  call.weight.n = call.n_out;
  if (call.m == 0 || call.weight.k == 0 || !rows(x, call.m, call.x_stride)) return false;
  call.x = static_cast<const float*>(x.data);
  call.weight.data = static_cast<const float*>(packed.data);

  if (args[3] == Py_None) {
    if (call.in_features != call.weight.k) return false;
  } else {
    if (!view(args[3], dlpack::kInt, 64, in_index) || !is_vector(in_index, call.weight.k)) return false;
    call.in_index = static_cast<const std::int64_t*>(in_index.data);
  }
  if (args[4] != Py_None) {
    if (!view(args[4], dlpack::kInt, 64, out_index) || out_index.ndim != 1) return false;
    call.weight.n = out_index.shape[0];
    if (call.weight.n == 0 || !is_vector(out_index, call.weight.n)) return false;
    call.out_index = static_cast<const std::int64_t*>(out_index.data);
  }
  if (packed.shape[0] != (call.weight.n + width - 1) / width) return false;
  if (args[2] != Py_None) {
    if (!view_input(args[2], bias) || !is_vector(bias, call.weight.n)) return false;
    call.weight.bias = static_cast<const float*>(bias.data);
  }
  if (args[7] != Py_None) {
    if (!view_input(args[7], residual) || residual.ndim != x.ndim) return false;
    for (int d = 0; d < x.ndim - 1; ++d)
      if (residual.shape[d] != x.shape[d]) return false;
    if (residual.shape[x.ndim - 1] != call.n_out || !rows(residual, call.m, call.residual_stride))
      return false;
    call.residual = static_cast<const float*>(residual.data);
  }
  return true;
}

// x.new_empty(*x.shape[:-1], n_out): new_empty, because a default device or dtype must not reach y.
PyObject* allocate(PyObject* x_object, const dlpack::Tensor& x, std::int64_t n_out) {
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
  return y;
}

PyObject* call_fn(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) {
    PyErr_Format(PyExc_TypeError, "call takes 9 arguments (got %zd)", count);
    return nullptr;
  }
  LinearCall call;
  dlpack::Tensor x, out;
  if (tensor_from_py_object == nullptr || !read_arguments(args, call, x)) Py_RETURN_NONE;
  PyObject* y = allocate(args[0], x, call.n_out);
  if (y == nullptr) return nullptr;
  if (!view_floats(y, out)) {
    Py_DECREF(y);
    Py_RETURN_NONE;
  }
  call.y = static_cast<float*>(out.data);
  call.y_stride = call.n_out;
  PyObject* error_type = nullptr;
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    compact_linear(call);
  } catch (const std::invalid_argument& refused) {
    error_type = PyExc_ValueError;
    error = refused.what();
  } catch (const std::exception& failed) {
    error_type = PyExc_RuntimeError;
    error = failed.what();
  }
  Py_END_ALLOW_THREADS;
  if (error_type != nullptr) {
    Py_DECREF(y);
    PyErr_SetString(error_type, error.c_str());
    return nullptr;
  }
  return y;
}

PyObject* use_tensor_types_fn(PyObject*, PyObject* const* args, Py_ssize_t count) {
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

PyMethodDef methods[] = {
    {"use_tensor_types", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(use_tensor_types_fn)),
     METH_FASTCALL, "use_tensor_types(Tensor, Parameter) -> whether `call` can look into them."},
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_fn)), METH_FASTCALL,
     "call(x, packed, bias, in_index, out_index, n_out, activation, residual, threads) -> y, or None where "
     "the "
     "checked path must run it. Knows no autograd, no dispatch modes: ask about those first."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_eager_call(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace prunekern
