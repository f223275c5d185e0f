// prunekern._C.call_norm: what `call` is for compact_linear, for rms_norm.
#include "eager_call.h"
#include "eager_tensor.h"
#include "prunekern/norm.h"

namespace prunekern {
namespace {

bool read_arguments(PyObject* const* args, NormCall& call, dlpack::Tensor& x) {
  Element element;
  if (!eager::ready() || !eager::view_input(args[0], x, element) || element != Element::fp32) return false;
  call.rows = eager::count_rows(x);
  call.n = x.shape[x.ndim - 1];
  if (call.rows * call.n == 0 || !eager::rows(x, call.rows, call.x_stride)) return false;
  call.x = static_cast<const float*>(x.data);
  return eager::view_vector(args[1], call.n, call.weight) && eager::to_float(args[2], call.eps) &&
         eager::read_threads(args[3], call.threads);
}

}  // namespace

PyObject* eager_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_Format(PyExc_TypeError, "call_norm takes 4 arguments (got %zd)", count);
    return nullptr;
  }
  NormCall call;
  dlpack::Tensor x;
  if (!read_arguments(args, call, x)) Py_RETURN_NONE;
  void* data = nullptr;
  PyObject* y = eager::allocate(args[0], x, call.n, data);
  if (y == nullptr || y == Py_None) return y;
  call.y = static_cast<float*>(data);
  return eager::finish(y, [](const void* c) { rms_norm(*static_cast<const NormCall*>(c)); }, &call);
}

}  // namespace prunekern
