// Instruction sets: what this CPU can run, and what is in use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prunekern {

// fp32 arithmetic is that of generic, avx2 or avx512; what others add are products of 8 and 16 bits.
//   avx2_vnni:   AVX-VNNI, int8 in vectors of 256 bits
//   avx512_vnni: int8
//   avx512_bf16: avx512_vnni, and bf16 where a short measurement finds it faster than fp32
//   amx:         avx512_bf16, and bf16 in tiles
enum class Isa { generic, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx };
constexpr int kIsas = 7;

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

// What is multiplied with what.
enum class Arithmetic { fp32, bf16, int8 };
const char* name(Arithmetic arithmetic);
Arithmetic parse_arithmetic(const std::string& text);

// Runs multiply-adds that touch no memory and returns their number of flops (two for each): time it, and you
// have the peak that compact_linear is to be measured against. 100,000 steps take a millisecond or less. 0
// where `isa` has no such arithmetic of its own.
std::int64_t run_peak(Isa isa, std::int64_t steps, Arithmetic arithmetic = Arithmetic::fp32);

// Whether vectors of bf16 (avx512_bf16) multiply faster here than those of fp32, measured once, in a
// millisecond; and what came out: one line, for people.
struct Bf16Verdict {
  bool pays = false;
  std::string reason;
};
const Bf16Verdict& bf16_verdict();

// Reads `bytes` of memory once, the fastest way `isa` has, and returns a checksum (so that nobody drops it).
std::uint64_t run_read(Isa isa, const void* memory, std::int64_t bytes);

}  // namespace prunekern
