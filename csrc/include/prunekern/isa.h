// Instruction sets: what this CPU can run, and what is in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prunekern {

// `amx` is avx512 with bf16 tiles: it differs from avx512 where weights are bf16, and nowhere else.
enum class Isa { generic, avx2, avx512, amx };

const char* name(Isa isa);
Isa parse_isa(const std::string& text);

// What this CPU and its operating system can run, worst first. `generic` is always there; `amx` only after a
// self-test that compares numbers.
std::vector<Isa> supported_isas();

// Whether AMX is in use, and if not why: one line, for people.
struct AmxVerdict {
  bool works = false;
  std::string reason;
};
const AmxVerdict& amx_verdict();

// The best of supported_isas(), or what the environment variable PRUNEKERN_ISA asks for (read once; throws
// where the CPU cannot run it).
Isa active_isa();

// Runs multiply-adds that touch no memory and returns their number of flops: time it, and you have the peak
// that compact_linear is to be measured against. 100,000 steps take a millisecond or less.
std::int64_t run_peak(Isa isa, std::int64_t steps);

// Reads `bytes` of memory once, the fastest way `isa` has, and returns a checksum (so that nobody drops it).
std::uint64_t run_read(Isa isa, const void* memory, std::int64_t bytes);

}  // namespace prunekern
