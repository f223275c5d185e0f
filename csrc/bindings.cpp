// prunekern._C: addresses and sizes in, numbers out. No torch: prunekern/ops checks tensors and passes
// addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bind.h"
#include "eager_call.h"
#include "prunekern/isa.h"

namespace py = pybind11;

namespace {

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
      "amx_verdict",
      [] {
        const prunekern::AmxVerdict& verdict = prunekern::amx_verdict();
        return py::make_tuple(verdict.works, verdict.reason);
      },
      "(whether AMX works here, why or why not).");
  m.def(
      "run_peak", [](std::int64_t steps) { return prunekern::run_peak(prunekern::active_isa(), steps); },
      "Runs multiply-adds that touch no memory; returns their flops, to be divided by their time.");
  m.def(
      "run_read",
      [](std::uintptr_t memory, std::int64_t bytes) {
        return prunekern::run_read(prunekern::active_isa(), reinterpret_cast<const void*>(memory), bytes);
      },
      "Reads memory once, as fast as it goes, and returns a checksum: bytes over its time are the "
      "bandwidth.");
  prunekern::bind_linear(m);
  prunekern::bind_attention(m);
  prunekern::bind_mlp(m);
  if (!prunekern::add_eager_call(m.ptr())) throw py::error_already_set();
}
