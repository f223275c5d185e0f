// prunekern._C: packing and compact_linear.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bind.h"
#include "huge_pages.h"
#include "prunekern/linear.h"

namespace py = pybind11;

namespace prunekern {
WeightType parse_type(const std::string& text) {
  for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8})
    if (text == name(type)) return type;
  throw std::invalid_argument("weights must be fp32, bf16 or int8 (got " + text + ")");
}

Element parse_element(const std::string& text) {
  if (text == "fp32") return Element::fp32;
  if (text == "bf16") return Element::bf16;
  throw std::invalid_argument("element must be fp32 or bf16 (got " + text + ")");
}

namespace {

void linear(Address x, std::int64_t m, std::int64_t x_stride, std::int64_t in_features, Address packed,
            std::int64_t n, std::int64_t k, Address y, std::int64_t y_stride, std::int64_t n_out,
            Address bias, Address in_index, Address out_index, const std::string& activation,
            Address residual, std::int64_t residual_stride, int threads, const std::string& weights,
            Address scale, const std::string& element) {
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

std::int64_t bytes(std::int64_t n, std::int64_t k, const std::string& weights) {
  return packed_bytes(active_isa(), parse_type(weights), n, k);
}

void pack(Address weight, std::int64_t row_stride, std::int64_t column_stride, std::int64_t n, std::int64_t k,
          Address packed, const std::string& weights, Address scale) {
  const WeightType type = parse_type(weights);
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  pack_weight(isa, type, at<const float>(weight), row_stride, column_stride, n, k, at<void>(packed),
              at<float>(scale));
}

void unpack(Address packed, std::int64_t n, std::int64_t k, Address weight, const std::string& weights,
            Address scale) {
  const WeightType type = parse_type(weights);
  const Isa isa = active_isa();
  py::gil_scoped_release release;
  unpack_weight(isa, type, at<const void>(packed), at<const float>(scale), n, k, at<float>(weight));
}

}  // namespace

void bind_linear(py::module_& m) {
  using py::arg;
  m.def(
      "panel_width", [] { return panel_width(active_isa()); },
      "Columns of a packed panel for the instruction set in use.");
  m.def("packed_bytes", &bytes, arg("n"), arg("k"), arg("weights") = "fp32",
        "Bytes that pack_weight writes for a weight [n, k].");
  m.def(
      "prefer_huge_pages",
      [](Address memory, std::int64_t size) { prefer_huge_pages(at<void>(memory), size); }, arg("memory"),
      arg("bytes"), "Asks for huge pages where fresh memory fills them; pack_weight does so itself.");
  m.def(
      "pack_weight", &pack, arg("weight"), arg("row_stride"), arg("column_stride"), arg("n"), arg("k"),
      arg("packed"), arg("weights") = "fp32", arg("scale") = 0,
      "float weight [n, k] (any strides) -> packed, see prunekern/linear.h; scale [n] is written for int8.");
  m.def("unpack_weight", &unpack, arg("packed"), arg("n"), arg("k"), arg("weight"), arg("weights") = "fp32",
        arg("scale") = 0, "packed -> float weight [n, k], contiguous.");
  m.def("compact_linear", &linear, arg("x"), arg("m"), arg("x_stride"), arg("in_features"), arg("packed"),
        arg("n"), arg("k"), arg("y"), arg("y_stride"), arg("n_out"), arg("bias") = 0, arg("in_index") = 0,
        arg("out_index") = 0, arg("activation") = "none", arg("residual") = 0, arg("residual_stride") = 0,
        arg("threads") = 1, arg("weights") = "fp32", arg("scale") = 0, arg("element") = "fp32",
        "LinearCall of prunekern/linear.h. element: what x, residual and y hold, fp32 or bf16.");
}

}  // namespace prunekern
