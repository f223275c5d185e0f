// prunekern._C: compact_linear.
#include "prunekern/linear.h"

#include <string>

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

void linear(Address x, std::int64_t m, std::int64_t x_stride, std::int64_t in_features, Address packed,
            std::int64_t n, std::int64_t k, Address y, std::int64_t y_stride, std::int64_t n_out,
            Address bias, Address in_index, Address out_index, const std::string& activation,
            Address residual, std::int64_t residual_stride, int threads, const std::string& weights,
            Address scale, const std::string& element, const std::string& activations) {
  LinearCall call;
  call.m = m;
  call.in_features = in_features;
  call.n_out = n_out;
  call.weight.type = parse_type(weights);
  call.weight.n = n;
  call.weight.k = k;
  call.weight.data = at<const void>(packed);
  call.weight.scale = at<const float>(scale);
  call.weight.bias = at<const float>(bias);
  call.weight.activations = parse_activations(activations);
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
  compact_linear(call);
}

struct EagerLinear {
  static constexpr const char* kName = "call";
  enum Argument {
    kX,
    kPacked,
    kBias,
    kInIndex,
    kOutIndex,
    kOut,
    kActivation,
    kResidual,
    kThreads,
    kScale,
    kActivations,
    kArguments
  };

  bool read(PyObject* const* args) {
    if (!eager::view_input(args[kX], x, linear.element)) return false;
    if (!eager::to_int(args[kOut], linear.n_out) ||
        !eager::read_activation(args[kActivation], linear.activation) ||
        !eager::read_threads(args[kThreads], linear.threads))
      return false;
    linear.m = eager::count_rows(x);
    linear.in_features = x.shape[x.ndim - 1];
    if (linear.m == 0 || linear.n_out <= 0 || !eager::rows(x, linear.m, linear.x_stride)) return false;
    linear.x = x.data;
    std::int64_t k = linear.in_features, n = linear.n_out;
    return eager::read_index(args[kInIndex], linear.in_index, k) &&
           eager::read_index(args[kOutIndex], linear.out_index, n) &&
           eager::read_weight(args[kPacked], args[kScale], args[kBias], args[kActivations], n, k,
                              linear.weight) &&
           eager::read_residual(args[kResidual], x, linear.element, linear.m, linear.n_out, linear.residual,
                                linear.residual_stride);
  }
  std::int64_t channels() const { return linear.n_out; }
  void write_to(void* y) {
    linear.y = y;
    linear.y_stride = linear.n_out;
  }
  void run() const { compact_linear(linear); }

  dlpack::Tensor x;
  LinearCall linear;
};

}  // namespace

void add_linear(py::module_& m) {
  using py::arg;
  m.def("compact_linear", &linear, arg("x"), arg("m"), arg("x_stride"), arg("in_features"), arg("packed"),
        arg("n"), arg("k"), arg("y"), arg("y_stride"), arg("n_out"), arg("bias") = 0, arg("in_index") = 0,
        arg("out_index") = 0, arg("activation") = "none", arg("residual") = 0, arg("residual_stride") = 0,
        arg("threads") = 1, arg("weights") = "fp32", arg("scale") = 0, arg("element") = "fp32",
        arg("activations") = "auto",
        "LinearCall of prunekern/linear.h. element: what x, residual and y hold, fp32 or bf16.");
  eager::add_call<EagerLinear>(m,
                               "call(x, packed, bias, in_index, out_index, n_out, activation, residual, "
                               "threads, scale, activations) -> y, or "
                               "None where the checked path must run it. Knows no autograd, no dispatch "
                               "modes: ask about those first.");
}

}  // namespace prunekern
