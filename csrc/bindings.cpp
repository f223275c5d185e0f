// prunekern._C: addresses and sizes in, numbers out. No torch: prunekern/ops checks tensors and passes
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "eager_call.h"
#include "prunekern/prunekern.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;  // 0: not given

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void compact_linear(Address x, std::int64_t m, std::int64_t x_stride, std::int64_t in_features,
                    Address packed, std::int64_t n, std::int64_t k, Address bias, Address in_index,
                    Address out_index, std::int64_t n_out, int activation, Address residual,
                    std::int64_t residual_stride, Address y, std::int64_t y_stride, int threads) {
  if (activation < 0 || activation > static_cast<int>(prunekern::Activation::silu))
    throw std::invalid_argument("compact_linear: activation must be 0 to 4");
  prunekern::LinearCall call;
  call.m = m;
  call.in_features = in_features;
  call.weight.k = k;
  call.weight.n = n;
  call.n_out = n_out;
  call.x = at<const float>(x);
  call.x_stride = x_stride;
  call.weight.data = at<const float>(packed);
  call.weight.bias = at<const float>(bias);
  call.in_index = at<const std::int64_t>(in_index);
  call.out_index = at<const std::int64_t>(out_index);
  call.residual = at<const float>(residual);
  call.residual_stride = residual_stride;
  call.y = at<float>(y);
  call.y_stride = y_stride;
  call.activation = static_cast<prunekern::Activation>(activation);
  call.threads = threads;
  py::gil_scoped_release release;
  prunekern::compact_linear(call);
}

void pack_weight(Address weight, std::int64_t row_stride, std::int64_t column_stride, std::int64_t n,
                 std::int64_t k, Address packed) {
  const prunekern::Isa isa = prunekern::active_isa();
  py::gil_scoped_release release;
  prunekern::pack_weight(isa, prunekern::WeightType::fp32, at<const float>(weight), row_stride, column_stride,
                         n, k, at<float>(packed), nullptr);
}

void unpack_weight(Address packed, std::int64_t n, std::int64_t k, Address weight) {
  const prunekern::Isa isa = prunekern::active_isa();
  py::gil_scoped_release release;
  prunekern::unpack_weight(isa, prunekern::WeightType::fp32, at<const float>(packed), nullptr, n, k,
                           at<float>(weight));
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (prunekern::Isa isa : prunekern::supported_isas()) names.emplace_back(prunekern::name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "prunekern's C++ core. Addresses are integers; 0 means not given.";
  m.def(
      "isa", [] { return std::string(prunekern::name(prunekern::active_isa())); },
      "The instruction set in use (PRUNEKERN_ISA overrides it).");
  m.def("supported_isas", &supported_isas, "What this CPU can run, worst first.");
  m.def(
      "panel_width", [] { return prunekern::panel_width(prunekern::active_isa()); },
      "Columns of a packed panel for the instruction set in use.");
  m.def("pack_weight", &pack_weight, "weight [n, k] (any strides) -> packed [ceil(n / w), k, w].");
  m.def("unpack_weight", &unpack_weight, "packed [ceil(n / w), k, w] -> weight [n, k], contiguous.");
  m.def("compact_linear", &compact_linear, "See prunekern/prunekern.h, LinearCall; arguments in this order.");
  m.def(
      "run_peak", [](std::int64_t steps) { return prunekern::run_peak(prunekern::active_isa(), steps); },
      "Runs multiply-adds that touch no memory; returns their flops, to be divided by their time.");
  if (!prunekern::add_eager_call(m.ptr())) throw py::error_already_set();
}
