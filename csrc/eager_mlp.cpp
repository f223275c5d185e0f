// prunekern._C.call_mlp: the same as eager_call.cpp for a whole MLP.
#include "eager_call.h"
#include "eager_tensor.h"
#include "prunekern/mlp.h"

namespace prunekern {
namespace {

enum Argument {
  kX,
  kUp,
  kDown,
  kGate,
  kUpBias,
  kDownBias,
  kGateBias,
  kUpScale,
  kDownScale,
  kGateScale,
  kInIndex,
  kOutIndex,
  kHidden,
  kOut,
  kActivation,
  kResidual,
  kThreads,
  kArguments
};

bool read_arguments(PyObject* const* args, MlpCall& call, dlpack::Tensor& x) {
  if (!eager::ready() || !eager::view_input(args[kX], x, call.element)) return false;
  std::int64_t hidden;
  if (!eager::to_int(args[kHidden], hidden) || !eager::to_int(args[kOut], call.n_out) ||
      !eager::read_activation(args[kActivation], call.activation) ||
      !eager::read_threads(args[kThreads], call.threads))
    return false;
  call.m = eager::count_rows(x);
  call.in_features = x.shape[x.ndim - 1];
  if (call.m == 0 || call.n_out <= 0 || !eager::rows(x, call.m, call.x_stride)) return false;
  call.x = x.data;

  std::int64_t k = call.in_features, n = call.n_out;
  if (args[kInIndex] != Py_None && !eager::view_index(args[kInIndex], call.in_index, k)) return false;
  if (args[kOutIndex] != Py_None && !eager::view_index(args[kOutIndex], call.out_index, n)) return false;
  if (args[kGate] == Py_None) {
    if (args[kGateBias] != Py_None || args[kGateScale] != Py_None) return false;
  } else if (!eager::read_weight(args[kGate], args[kGateScale], args[kGateBias], hidden, k, call.gate)) {
    return false;
  }
  return eager::read_weight(args[kUp], args[kUpScale], args[kUpBias], hidden, k, call.up) &&
         eager::read_weight(args[kDown], args[kDownScale], args[kDownBias], n, hidden, call.down) &&
         eager::read_residual(args[kResidual], x, call.element, call.m, call.n_out, call.residual,
                              call.residual_stride);
}

}  // namespace

PyObject* eager_mlp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_Format(PyExc_TypeError, "call_mlp takes %d arguments (got %zd)", static_cast<int>(kArguments),
                 count);
    return nullptr;
  }
  MlpCall call;
  dlpack::Tensor x;
  if (!read_arguments(args, call, x)) Py_RETURN_NONE;
  PyObject* y = eager::allocate(args[kX], x, call.n_out, call.y);
  if (y == nullptr || y == Py_None) return y;
  call.y_stride = call.n_out;
  return eager::finish(y, [](const void* c) { compact_mlp(*static_cast<const MlpCall*>(c)); }, &call);
}

}  // namespace prunekern
