// The parts of prunekern._C. Each file adds what it is named after, in two forms: a function that takes
// addresses and sizes, for whoever has no torch or no ordinary tensors, and an eager call that takes tensors
// (eager.h).
#pragma once

#include <pybind11/pybind11.h>

namespace prunekern {

void add_machine(pybind11::module_& m);
void add_packing(pybind11::module_& m);
void add_eager(pybind11::module_& m);
void add_linear(pybind11::module_& m);
void add_mlp(pybind11::module_& m);
void add_any_trains(pybind11::module_& m);
void add_attention(pybind11::module_& m);
void add_rotary(pybind11::module_& m);
void add_norm(pybind11::module_& m);
void add_decoder_block(pybind11::module_& m);
void add_disentangled_attention(pybind11::module_& m);
void add_encoder_block(pybind11::module_& m);
void add_prenorm_block(pybind11::module_& m);
void add_unchanged(pybind11::module_& m);

}  // namespace prunekern
