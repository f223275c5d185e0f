// prunekern._C: compact_mlp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>

#include "bind.h"
#include "prunekern/mlp.h"

namespace py = pybind11;

namespace prunekern {
namespace {

using Layer = std::tuple<std::string, Address, Address, Address>;  // weights, packed, bias, scale

Packed packed(const Layer& layer, std::int64_t n, std::int64_t k) {
  Packed weight;
  weight.type = parse_type(std::get<0>(layer));
  weight.n = n;
  weight.k = k;
  weight.data = at<const void>(std::get<1>(layer));
  weight.bias = at<const float>(std::get<2>(layer));
  weight.scale = at<const float>(std::get<3>(layer));
  return weight;
}

void mlp(Address x, std::int64_t m, std::int64_t x_stride, std::int64_t in_features, std::int64_t k,
         const Layer& up, std::int64_t n_hidden, const Layer& down, std::int64_t n, Address y,
         std::int64_t y_stride, std::int64_t n_out, const std::optional<Layer>& gate, Address in_index,
         Address out_index, const std::string& activation, Address residual, std::int64_t residual_stride,
         int threads, const std::string& element) {
  MlpCall call;
  call.m = m;
  call.in_features = in_features;
  call.n_out = n_out;
  call.up = packed(up, n_hidden, k);
  call.down = packed(down, n, n_hidden);
  if (gate) call.gate = packed(*gate, n_hidden, k);
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

}  // namespace

void bind_mlp(py::module_& m) {
  using py::arg;
  m.def("compact_mlp", &mlp, arg("x"), arg("m"), arg("x_stride"), arg("in_features"), arg("k"), arg("up"),
        arg("n_hidden"), arg("down"), arg("n"), arg("y"), arg("y_stride"), arg("n_out"),
        arg("gate") = py::none(), arg("in_index") = 0, arg("out_index") = 0, arg("activation") = "gelu",
        arg("residual") = 0, arg("residual_stride") = 0, arg("threads") = 1, arg("element") = "fp32",
        "MlpCall of prunekern/mlp.h. up, down, gate: (weights, packed, bias, scale), bias and scale 0 where "
        "there is none.");
}

}  // namespace prunekern
