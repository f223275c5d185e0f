// prunekern._C: packed weights.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "loops/huge_pages.h"
#include "prunekern/linear.h"
#include "python/addresses.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {

WeightType parse_type(const std::string& text) {
  for (WeightType type : {WeightType::fp32, WeightType::bf16, WeightType::int8, WeightType::int4})
    if (text == name(type)) return type;
  throw std::invalid_argument("weights must be fp32, bf16, int8 or int4 (got " + text + ")");
}

Element parse_element(const std::string& text) {
  if (text == "fp32") return Element::fp32;
  if (text == "bf16") return Element::bf16;
  throw std::invalid_argument("element must be fp32 or bf16 (got " + text + ")");
}

namespace {

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

void add_packing(py::module_& m) {
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
}

}  // namespace prunekern
