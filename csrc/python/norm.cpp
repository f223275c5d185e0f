// prunekern._C: rms_norm and layer_norm.
#include "prunekern/norm.h"

#include <cstdint>

#include "python/addresses.h"
#include "python/eager.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

void norm(std::int64_t rows, std::int64_t n, Address x, std::int64_t x_stride, Address weight, float eps,
          Address y, int threads) {
  py::gil_scoped_release release;
  rms_norm({rows, n, at<const float>(x), x_stride, at<const float>(weight), eps, at<float>(y), threads});
}

void layer(std::int64_t rows, std::int64_t n, Address x, std::int64_t x_stride, Address weight, Address bias,
           float eps, Address y, int threads) {
  py::gil_scoped_release release;
  layer_norm({rows, n, at<const float>(x), x_stride, at<const float>(weight), at<const float>(bias), eps,
              at<float>(y), threads});
}

// What the eager calls have in common. Call: NormCall or LayerNormCall.
template <class Call>
struct EagerRows {
  // Everything of x: fp32 rows of one stride, some of them.
  bool read_x(PyObject* object) {
    Element element;
    if (!eager::view_input(object, x, element) || element != Element::fp32) return false;
    norm.rows = eager::count_rows(x);
    norm.n = x.shape[x.ndim - 1];
    norm.x = static_cast<const float*>(x.data);
    return norm.rows * norm.n != 0 && eager::rows(x, norm.rows, norm.x_stride);
  }
  std::int64_t channels() const { return norm.n; }
  void write_to(void* y) { norm.y = static_cast<float*>(y); }

  dlpack::Tensor x;
  Call norm;
};

struct EagerNorm : EagerRows<NormCall> {
  static constexpr const char* kName = "call_norm";
  enum Argument { kX, kWeight, kEps, kThreads, kArguments };

  bool read(PyObject* const* args) {
    return read_x(args[kX]) && eager::view_vector(args[kWeight], norm.n, norm.weight) &&
           eager::to_float(args[kEps], norm.eps) && eager::read_threads(args[kThreads], norm.threads);
  }
  void run() const { rms_norm(norm); }
};

struct EagerLayerNorm : EagerRows<LayerNormCall> {
  static constexpr const char* kName = "call_layer_norm";
  enum Argument { kX, kWeight, kBias, kEps, kThreads, kArguments };

  bool read(PyObject* const* args) {
    return read_x(args[kX]) && eager::view_vector(args[kWeight], norm.n, norm.weight) &&
           (args[kBias] == Py_None || eager::view_vector(args[kBias], norm.n, norm.bias)) &&
           eager::to_float(args[kEps], norm.eps) && eager::read_threads(args[kThreads], norm.threads);
  }
  void run() const { layer_norm(norm); }
};

}  // namespace

void add_norm(py::module_& m) {
  using py::arg;
  m.def("rms_norm", &norm, arg("rows"), arg("n"), arg("x"), arg("x_stride"), arg("weight"), arg("eps"),
        arg("y"), arg("threads"), "NormCall of prunekern/norm.h.");
  eager::add_call<EagerNorm>(m, "call_norm(x, weight, eps, threads) -> y, or None: the same for rms_norm.");
  m.def("layer_norm", &layer, arg("rows"), arg("n"), arg("x"), arg("x_stride"), arg("weight"), arg("bias"),
        arg("eps"), arg("y"), arg("threads"), "LayerNormCall of prunekern/norm.h.");
  eager::add_call<EagerLayerNorm>(
      m, "call_layer_norm(x, weight, bias, eps, threads) -> y, or None: the same for layer_norm.");
}

}  // namespace prunekern
