// AMX on machines that have none: every tile instruction raises SIGILL there, and the handler does its work.
//
// What runs is the very machine code of kernels/amx.cpp and amx_int8.cpp, tile configuration, strides and
// addressing included, so its results can be tested anywhere. Its speed cannot: about 2 us an instruction.
#pragma once

#include <string>

namespace prunekern {

// Lets amx_verdict() find tiles: the machine's own, or else emulated ones. To be called before anything asks
// for an instruction set. Returns what the tests run on: "hardware", "emulated", or "" where the CPU lacks
// AVX-512 and bf16 conversions, which the kernel needs besides tiles.
std::string provide_amx();

// Whether this thread has tiles configured.
bool amx_in_use();

// Emulated tiles that get every sum of one kind of products wrong by one unit (or all right again): what the
// self-test is there for.
enum class Broken { nothing, bf16, int8 };
void break_emulated_amx(Broken what);

}  // namespace prunekern
