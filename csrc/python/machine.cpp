// prunekern._C: what this machine can do.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "prunekern/isa.h"
#include "python/addresses.h"
#include "python/module.h"

namespace py = pybind11;

namespace prunekern {
namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : supported_isas()) names.emplace_back(name(isa));
  return names;
}

}  // namespace

void add_machine(py::module_& m) {
  using py::arg;
  m.def(
      "isa", [] { return std::string(name(active_isa())); },
      "The instruction set in use (PRUNEKERN_ISA overrides it).");
  m.def("supported_isas", &isa_names, "What this CPU can run, worst first.");
  m.def(
      "amx_verdict",
      [] {
        const AmxVerdict& verdict = amx_verdict();
        return py::make_tuple(verdict.works, verdict.reason);
      },
      "(whether AMX works here, why or why not).");
  m.def(
      "bf16_verdict",
      [] {
        const Bf16Verdict& verdict = bf16_verdict();
        return py::make_tuple(verdict.pays, verdict.reason);
      },
      "(whether vectors of bf16 multiply faster here than fp32, what a short measurement said).");
  m.def(
      "run_peak",
      [](std::int64_t steps, const std::string& arithmetic) {
        return run_peak(active_isa(), steps, parse_arithmetic(arithmetic));
      },
      arg("steps"), arg("arithmetic") = "fp32",
      "Runs multiply-adds that touch no memory; returns their flops, to be divided by their time. 0 where "
      "the "
      "instruction set has no such arithmetic of its own.");
  m.def(
      "run_read",
      [](Address memory, std::int64_t bytes) {
        return run_read(active_isa(), at<const void>(memory), bytes);
      },
      arg("memory"), arg("bytes"),
      "Reads memory once, as fast as it goes, and returns a checksum: bytes over its time are the "
      "bandwidth.");
}

}  // namespace prunekern
