// prunekern._C: compact_mlp.
#include "prunekern/mlp.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

using Layer = std::tuple<std::string, Address, Address, Address>;  // weights, packed, bias, scale

Packed packed(const Layer& layer, std::int64_t n, std::int64_t k, Activations activations) {
  Packed weight;
  weight.type = parse_type(std::get<0>(layer));
  weight.n = n;
  weight.k = k;
  weight.data = at<const void>(std::get<1>(layer));
  weight.bias = at<const float>(std::get<2>(layer));
  weight.scale = at<const float>(std::get<3>(layer));
  weight.activations = activations;
  return weight;
}

void mlp(Address x, std::int64_t m, std::int64_t x_stride, std::int64_t in_features, std::int64_t k,
         const Layer& up, std::int64_t n_hidden, const Layer& down, std::int64_t n, Address y,
         std::int64_t y_stride, std::int64_t n_out, const std::optional<Layer>& gate, Address in_index,
         Address out_index, const std::string& activation, Address residual, std::int64_t residual_stride,
         int threads, const std::string& element, const std::string& activations) {
  const Activations made_of = parse_activations(activations);
  MlpCall call;
  call.m = m;
  call.in_features = in_features;
  call.n_out = n_out;
  call.up = packed(up, n_hidden, k, made_of);
  call.down = packed(down, n, n_hidden, made_of);
  if (gate) call.gate = packed(*gate, n_hidden, k, made_of);
  call.element = parse_element(element);
  call.x = at<const void>(x);
  call.x_stride = x_stride;
  call.in_index = at<const std::int64_t>(in_index);
  call.out_index = at<const std::int64_t>(out_index);
  call.residual = at<const void>(residual);
  call.residual_stride = residual_stride;
  call.y = at<void>(y);
  call.y_stride = y_stride;
  call.activation = parse_activation(activation);
  call.threads = threads;
  py::gil_scoped_release release;
  compact_mlp(call);
}

struct EagerMlp {
  static constexpr const char* kName = "call_mlp";
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
    kActivations,
    kArguments
  };

  bool read(PyObject* const* args) {
    std::int64_t hidden;
    if (!eager::view_input(args[kX], x, mlp.element) || !eager::to_int(args[kHidden], hidden) ||
        !eager::to_int(args[kOut], mlp.n_out) || !eager::read_activation(args[kActivation], mlp.activation) ||
        !eager::read_threads(args[kThreads], mlp.threads))
      return false;
    mlp.m = eager::count_rows(x);
    mlp.in_features = x.shape[x.ndim - 1];
    if (mlp.m == 0 || mlp.n_out <= 0 || !eager::rows(x, mlp.m, mlp.x_stride)) return false;
    mlp.x = x.data;
    std::int64_t k = mlp.in_features, n = mlp.n_out;
    if (!eager::read_index(args[kInIndex], mlp.in_index, k) ||
        !eager::read_index(args[kOutIndex], mlp.out_index, n))
      return false;
    if (args[kGate] == Py_None) {
      if (args[kGateBias] != Py_None || args[kGateScale] != Py_None) return false;
    } else if (!read_weight(args, kGate, hidden, k, mlp.gate)) {
      return false;
    }
    return read_weight(args, kUp, hidden, k, mlp.up) && read_weight(args, kDown, n, hidden, mlp.down) &&
           eager::read_residual(args[kResidual], x, mlp.element, mlp.m, mlp.n_out, mlp.residual,
                                mlp.residual_stride);
  }
  // of: kUp, kDown or kGate; biases and scales follow in that order.
  static bool read_weight(PyObject* const* args, int of, std::int64_t n, std::int64_t k, Packed& weight) {
    return eager::read_weight(args[of], args[kUpScale + of - kUp], args[kUpBias + of - kUp],
                              args[kActivations], n, k, weight);
  }
  std::int64_t channels() const { return mlp.n_out; }
  void write_to(void* y) {
    mlp.y = y;
    mlp.y_stride = mlp.n_out;
  }
  void run() const { compact_mlp(mlp); }

  dlpack::Tensor x;
  MlpCall mlp;
};

}  // namespace

void add_mlp(py::module_& m) {
  using py::arg;
  m.def("compact_mlp", &mlp, arg("x"), arg("m"), arg("x_stride"), arg("in_features"), arg("k"), arg("up"),
        arg("n_hidden"), arg("down"), arg("n"), arg("y"), arg("y_stride"), arg("n_out"),
        arg("gate") = py::none(), arg("in_index") = 0, arg("out_index") = 0, arg("activation") = "gelu",
        arg("residual") = 0, arg("residual_stride") = 0, arg("threads") = 1, arg("element") = "fp32",
        arg("activations") = "auto",
        "MlpCall of prunekern/mlp.h. up, down, gate: (weights, packed, bias, scale), bias and scale 0 where "
        "there is none.");
  eager::add_call<EagerMlp>(
      m,
      "call_mlp(x, up, down, gate, 3 biases, 3 scales, in_index, out_index, n_hidden, n_out, activation, "
      "residual, threads, activations) -> y, or None: the same for compact_mlp.");
}

}  // namespace prunekern
