// prunekern._C.call_rotary: what `call` is for compact_linear, for rotate_pairs.
#include <vector>

#include "eager_call.h"
#include "eager_tensor.h"
#include "prunekern/rotary.h"

namespace prunekern {
namespace {

bool read_arguments(PyObject* const* args, RotaryCall& call, dlpack::Tensor& x,
                    std::vector<std::int64_t>& first) {
  dlpack::Tensor cos, sin;
  std::int64_t pairs;
  if (!eager::ready() || !eager::to_int(args[5], call.shared_by) || call.shared_by < 1) return false;
  if (!eager::view_tokens(args[0], x, call.x, call.x_batch_stride, call.x_stride) ||
      !eager::view_tokens(args[1], cos, call.cos, call.cos_batch_stride, call.cos_stride) ||
      !eager::view_tokens(args[2], sin, call.sin, call.sin_batch_stride, call.sin_stride) ||
      !eager::view_index(args[3], call.angle, pairs) ||
      !eager::read_firsts(args[4], x.shape[2] / call.shared_by, first))
    return false;
  call.batch = x.shape[0];
  call.tokens = x.shape[1];
  call.angles = cos.shape[2];
  call.heads = static_cast<std::int64_t>(first.size()) - 1;
  call.first = first.data();
  for (const dlpack::Tensor* table : {&cos, &sin}) {
    if (table->shape[1] != call.tokens || table->shape[2] != call.angles) return false;
    if (table->shape[0] != call.batch && table->shape[0] != 1) return false;
  }
  if (cos.shape[0] == 1) call.cos_batch_stride = 0;
  if (sin.shape[0] == 1) call.sin_batch_stride = 0;
  if (x.shape[2] != call.shared_by * first.back() || 2 * pairs != first.back()) return false;
  return call.batch * call.tokens * x.shape[2] > 0 && eager::read_threads(args[6], call.threads);
}

}  // namespace

PyObject* eager_rotary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) {
    PyErr_Format(PyExc_TypeError, "call_rotary takes 7 arguments (got %zd)", count);
    return nullptr;
  }
  RotaryCall call;
  dlpack::Tensor x;
  std::vector<std::int64_t> first;
  if (!read_arguments(args, call, x, first)) Py_RETURN_NONE;
  void* data = nullptr;
  PyObject* y = eager::allocate(args[0], x, x.shape[2], data);
  if (y == nullptr || y == Py_None) return y;
  call.y = static_cast<float*>(data);
  call.y_stride = x.shape[2];
  call.y_batch_stride = call.tokens * call.y_stride;
  return eager::finish(y, [](const void* c) { rotate_pairs(*static_cast<const RotaryCall*>(c)); }, &call);
}

}  // namespace prunekern
